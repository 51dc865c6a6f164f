"""Recipes: one YAML file that says everything about a run, read strictly."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dwakd.errors import UserError
from dwakd.options import check_type
from dwakd.validation import unknown_option

RECIPE_FILE = "dwakd-recipe.yaml"
"""The resolved recipe in a run's folder."""


@dataclass
class StudentSection:
    """The student; `peft` takes the fields of peft.LoraConfig and trains an adapter instead of the weights."""

    model: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    peft: dict[str, Any] | None = None


@dataclass
class TeacherSection:
    """The teacher; `adapter` is a PEFT folder that is merged into it, `cache` a folder of its hidden states.

    `weight` is its share among several teachers, relative to theirs.
    """

    model: str
    weight: float = 1.0
    adapter: str | None = None
    cache: str | None = None
    cache_dtype: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass
class DataSection:
    """What to train on, and how both models are shown it."""

    train: str
    eval: str | None = None
    prompt: str | None = None
    response: str | None = None
    input: str | None = None
    template: str = "alpaca"
    bos: str = "auto"
    special_tokens_in_prompts: str = "parse"
    max_length: int = 512
    max_prompt_length: int = 256
    invalid_rows: str = "error"
    limit: int | None = None
    eval_limit: int | None = None


@dataclass
class EvaluationSection:
    """What to answer after training."""

    test: list[str] = field(default_factory=list)
    seeds: int = 5
    max_new_tokens: int = 256
    batch_size: int = 16
    limit: int | None = None


@dataclass
class CompareSection:
    """What `dwakd compare` runs: methods (all that fit if empty), training seeds, and options by method."""

    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1])
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """A whole run. `loss` holds `method` and its options; `training` goes to DistillConfig unchanged.

    `teacher` is a section, or a list of them for several teachers.
    """

    student: StudentSection
    data: DataSection
    teacher: TeacherSection | list[TeacherSection] | None = None
    loss: dict[str, Any] = field(default_factory=lambda: {"method": "dwa_kd"})
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    compare: CompareSection | None = None

    @property
    def teachers(self) -> list[TeacherSection]:
        if self.teacher is None:
            return []
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]

    @property
    def method(self) -> str:
        return str(self.loss.get("method", "dwa_kd"))

    @property
    def loss_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.loss.items() if name != "method"}

    def dump(self) -> str:
        """The resolved recipe as YAML; reading it back gives the same recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML as everybody means it: 5e-4 is a number, `no` is a word, and a key is given once.

    YAML 1.1 reads 5e-4 as a string and `no` as false, and lets the last of two equal keys win.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name)
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML as `_Loader` reads it."""
    return yaml.load(text, Loader=_Loader)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides such as `loss.temperature=4`.

    Raises:
        UserError: no such file, not YAML, or an unknown, missing or mistyped option, by its dotted name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {_place_and_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must hold sections such as student, teacher and data")
    for override in overrides or []:
        apply_override(content, override)
    return recipe_from_dict(content)


def read_saved_recipe(path: Path, *, mend: str) -> dict[str, Any]:
    """The options of a run's own recipe, which `Recipe.dump` wrote.

    Raises:
        UserError: it cannot be read; ends with `mend`.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({_place_and_reason(error)}); {mend}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise UserError(f"{path} is damaged (it has no section data); {mend}")
    return content


def _place_and_reason(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """One line: PyYAML's own words name a stream that no user knows."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted option, `section.name=value`, the value read as YAML."""
    name, equals, value = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r} must look like section.option=value, for example loss.temperature=4")
    node = content
    for key in keys[:-1]:
        if isinstance(node.get(key), list):
            raise UserError(f"override {override!r}: {key} is a list here; edit the recipe")
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {key} is no section")
    try:
        node[keys[-1]] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error


def recipe_from_dict(content: dict[str, Any]) -> Recipe:
    """A recipe from nested dictionaries, strictly."""
    if not isinstance(content.get("loss"), dict | None):
        raise UserError(f"loss must be a section with method and options, got {content['loss']!r}")
    recipe: Recipe = _section(Recipe, content, "")
    if not isinstance(recipe.loss.get("method", "dwa_kd"), str):
        raise UserError("loss.method must be a string")
    return recipe


def _section(cls: type[Any], content: Any, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise UserError(f"{prefix.rstrip('.')} must be a section with options, got {content!r}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in content:
        if name not in fields:
            raise unknown_option(f"{prefix}{name}", name, list(fields))
    values = {}
    for name, item in fields.items():
        if name in content and not (content[name] is None and prefix == ""):
            values[name] = _value(hints[name], content[name], f"{prefix}{name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing from the recipe")
    return cls(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        inner = next(iter(typing.get_args(option)), None)
        if isinstance(value, list) and value and dataclasses.is_dataclass(inner):
            sections = enumerate(value, start=1)
            return [_section(typing.cast("type[Any]", inner), item, f"{name}.{k}.") for k, item in sections]
    for option in options:
        if dataclasses.is_dataclass(option):
            return _section(typing.cast("type[Any]", option), value, f"{name}.")
    check_type(hint, value, name)
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise UserError(f"unknown option {name}.{key}; the names of options are words")
    return value
