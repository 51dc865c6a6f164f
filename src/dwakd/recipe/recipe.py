"""A whole recipe, validated: its sections, and what depends on several of them."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import Field, field_validator, model_validator

from dwakd.environment import supports_bfloat16
from dwakd.errors import UserError
from dwakd.losses import METHODS, SUM, MethodOptions
from dwakd.losses.options import refuse_served
from dwakd.losses.weighted_sum import SumOptions
from dwakd.recipe.checks import check_best_metric, refuse_cached_attention, refuse_cached_sampling
from dwakd.recipe.files import read_recipe
from dwakd.recipe.sections import (
    CompareSection,
    DataSection,
    EvaluationSection,
    GenerateSection,
    StudentSection,
    TeacherSection,
    check_teacher_key,
)
from dwakd.recipe.training import ELSEWHERE, TrainingOptions, TrainingSection
from dwakd.validation import Section, parse

DEFAULT_METHOD = "dwa_kd"
NEED_EVALUATION = ("eval_strategy", "eval_rouge_l", "load_best_model_at_end", "metric_for_best_model")
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
Command = Literal["train", "cache", "compare", "generate"]

if TYPE_CHECKING:
    Loss: TypeAlias = MethodOptions
else:
    Loss = Annotated[
        functools.reduce(operator.or_, [*(method.options_type for method in METHODS.values()), SumOptions]),
        Field(discriminator="method"),
    ]


class Recipe(Section):
    """A training run. Validation with another command as the context permits what only that command can use."""

    student: StudentSection = Field(description="The model to train.")
    data: DataSection = Field(description="The rows to train on, and how they become text.")
    teacher: TeacherSection | list[TeacherSection] | None = Field(None, description="One teacher, or several.")
    loss: Loss = Field(
        METHODS[DEFAULT_METHOD].options_type(), description="The method and its options, or a list of methods to add."
    )
    training: TrainingSection = Field({}, description="Options of transformers.TrainingArguments and of DistillConfig.")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="Test sets to answer after the training.")
    generate: GenerateSection = Field(GenerateSection(), description="The prompts that the teacher answers.")
    compare: CompareSection | None = Field(None, description="What `dwakd compare` trains.")

    @field_validator("loss", mode="wrap")
    @classmethod
    def _add_method(cls, loss: Any, validate: Callable[[Any], MethodOptions]) -> MethodOptions:
        if isinstance(loss, list):
            return validate({"method": SUM, "losses": loss})
        return validate({"method": DEFAULT_METHOD, **loss} if isinstance(loss, dict) else loss)

    @property
    def teachers(self) -> list[TeacherSection]:
        """The teachers as a list."""
        if isinstance(self.teacher, list):
            return self.teacher
        return [] if self.teacher is None else [self.teacher]

    @property
    def teacher_names(self) -> list[str]:
        """The name of each teacher, by default its number."""
        return [teacher.name or str(number) for number, teacher in enumerate(self.teachers, start=1)]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.loss.method_name()

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of the method that the recipe gives."""
        return self.loss.model_dump(exclude_unset=True, exclude={"method"})

    def content(self) -> dict[str, Any]:
        """Return the resolved sections as plain values, of the loss only the options that the recipe gives."""
        options = self.loss_options
        loss = options["losses"] if self.method == SUM else {"method": self.method, **options}
        return self.model_dump() | {"loss": loss}

    def dump(self) -> str:
        """Return the resolved recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True)

    def replace(self, **sections: Any) -> Recipe:
        """Return a recipe with other sections, validated for training."""
        return parse(Recipe, dict(self) | sections)

    @model_validator(mode="after")
    def _choose_dtypes(self) -> Recipe:
        dtype = "bfloat16" if supports_bfloat16(use_cpu=bool(self.training.get("use_cpu"))) else "float32"
        for section in self.teachers:
            if section.dtype is None and section.url is None:
                object.__setattr__(section, "dtype", dtype)  # a saved recipe names the dtype
        return self

    @model_validator(mode="after")
    def _check_run(self, info: Any) -> Recipe:  # a ValidationInfo, a protocol that beartype cannot check
        command = info.context or "train"
        templates = [section.chat_template_path for section in (self.student, *self.teachers)]
        if any(templates) and self.data.template != "chat":
            raise UserError(f"chat_template_path requires data.template: chat, got data.template: {self.data.template}")
        answers = command == "generate" or self.data.responses == "teacher"
        if answers and self.generate.endpoint is None and all(one.url is not None for one in self.teachers[:1]):
            raise UserError(
                "nobody answers the prompts: add a teacher without url to the recipe, or set generate.endpoint"
            )
        if command in ("compare", "generate") or (command == "cache" and self.compare is not None):
            return self
        if self.data.responses == "teacher" and self.generate.output is None:
            raise UserError("data.responses: teacher requires generate.output, the file of the teacher's answers")
        if self.data.responses == "teacher" and self.training.get("lmbda") == 1:
            raise UserError(
                "with training.lmbda: 1 the student answers every prompt, so the teacher's answers of data.responses: teacher "
                "are never used: set data.responses to given, or training.lmbda below 1"
            )
        if self.loss.needs_teacher and not self.teachers:
            raise UserError(f"method {self.method} needs a teacher: add a teacher section to the recipe")
        if self.data.teacher_key is not None:
            check_teacher_key(self.data.teacher_key, self.teacher_names, [each.weight for each in self.teachers])
            if self.data.responses == "teacher":
                raise UserError(
                    "data.teacher_key chooses among teachers, but with data.responses: teacher the first one answers all "
                    "prompts: set data.responses to given, or remove data.teacher_key"
                )
        self._check_caches(command)
        options = self.training
        used = [name for name in NEED_EVALUATION if options.get(name) not in (None, False, "no")]
        used += ["save_strategy=best"] if options.get("save_strategy") == "best" else []
        if used and self.data.eval is None:
            raise UserError(f"training.{used[0]} requires an evaluation set: set data.eval")
        metric = options.get("metric_for_best_model") or "loss"
        check_best_metric(metric, self.loss, rouge_l=bool(options.get("eval_rouge_l")))
        return self

    def _check_caches(self, command: str) -> None:
        for teacher in self.teachers:
            if teacher.cache is None and teacher.cache_dtype is not None and command == "train":
                raise UserError("teacher.cache_dtype requires teacher.cache, the folder of the cache")
            if teacher.url is not None:
                refuse_served(self.loss)
            elif teacher.cache is not None:
                refuse_cached_attention(self.loss)
                refuse_cached_sampling(self.training.get("lmbda") or 0.0)


def load_recipe(path: str | Path, overrides: list[str] | None = None, command: Command = "train") -> Recipe:
    """Read a recipe and apply overrides such as `loss.temperature=4`.

    Raises:
        UserError: there is no such file, it is not valid YAML, or an option is unknown, missing or has a value that is
            not allowed; the message gives its dotted name.
    """
    content = read_recipe(Path(path), overrides or ())
    try:
        return recipe_from_dict(content, command)
    except UserError as error:
        method = next((one.partition("=")[2] for one in overrides or () if one.startswith("loss.method=")), None)
        if method is None or not str(error).startswith("unknown option loss."):
            raise
        raise UserError(
            f"{error}; loss.method={method} keeps the other options of the recipe's section loss: to replace the section, "
            f"write 'loss={{method: {method}}}'"
        ) from None


def recipe_from_dict(content: dict[str, Any], command: Command = "train") -> Recipe:
    """Validate the sections of a recipe, as `load_recipe` does. A section that is None is left out."""
    given = {name: section for name, section in content.items() if section is not None}
    for name in given:
        if name in TrainingOptions.model_fields:
            raise UserError(f"{name} is not a section of a recipe: {ELSEWHERE.get(name, f'use training.{name}')}")
        _refuse_passwords(given[name], str(name))
    return parse(Recipe, given, context=command)


def _refuse_passwords(value: Any, name: str) -> None:
    """Raise UserError if an option contains an address with a password; those of servers are checked in their sections."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_passwords(item, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_passwords(item, name)
    elif isinstance(value, str) and not name.endswith(("template", "url")) and _PASSWORD.search(value):
        raise UserError(
            f"{name} must not contain a password, because recipes are stored: use environment variables or the configuration "
            "file of fsspec"
        )


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe."""
    schema = Recipe.model_json_schema()
    for definition in schema["$defs"].values():
        if definition.get("properties", {}).get("method", {}).get("const", DEFAULT_METHOD) != DEFAULT_METHOD:
            definition["required"] = ["method"]  # so that options without a method match the default one alone
    schema["$defs"]["SumOptions"]["required"] = ["method", "losses"]
    parts = schema["$defs"]["SumOptions"]["properties"]["losses"]
    schema["properties"]["loss"] = {"anyOf": [schema["properties"]["loss"], parts], "description": parts["description"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
