"""Plan the runs of a comparison: rows, each a set of overrides of the recipe, with several training seeds."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dwakd.errors import UserError
from dwakd.losses import METHODS, MethodOptions, method_options
from dwakd.losses.weighted_sum import SumOptions
from dwakd.recipe.files import set_option
from dwakd.recipe.recipe import Recipe, recipe_from_dict
from dwakd.recipe.sections import CompareSection

_NO_WEIGHTS = {"loss.entropy_weights": False, "loss.gate": False, "loss.teacher_weights": False}
_NO_ALIGNMENT = {"loss.dtw_hidden": False, "loss.dtw_embedding": False}
ABLATION: dict[str, dict[str, Any]] = {
    "dskd": {"loss.method": "dskd"},
    "dskd + entropy weights": {"loss.method": "dwa_kd", "loss.gate": False, **_NO_ALIGNMENT},
    "dskd + dtw": {"loss.method": "dwa_kd", **_NO_WEIGHTS, "loss.band": False},
    "dskd + banded dtw": {"loss.method": "dwa_kd", **_NO_WEIGHTS},
    "dwa_kd without gate": {"loss.method": "dwa_kd", "loss.gate": False},
    "dwa_kd": {"loss.method": "dwa_kd"},
}
"""The rows of DWA-KD's table 3."""
RATES, SHARES = (1 / 3, 1.0, 3.0), (0.5, 1.0)
"""Factors of the search, for the learning rates and for the weight of distillation."""
_NAME = re.compile(r"\w[\w .,+=-]*")
_CHANGEABLE = re.compile(r"loss$|teacher$|(student|teacher|data|loss|training|generate)\..")
_FIXED = re.compile(r"data\.(eval|eval_limit|prompt|response|input)$|training\.(data_)?seed$")


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Args:
        name: its name.
        overrides: options by their dotted names, with the values that replace those of the recipe.
        rate_factor: factor of the learning rates.
        option: the option of the recipe that defines the row, which messages name.
    """

    name: str
    overrides: dict[str, Any]
    rate_factor: float = 1.0
    option: str = ""

    @property
    def folder_name(self) -> str:
        """The name as a valid folder name."""
        return self.name.replace(" ", "_").replace("+", "plus")

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Begin the message of a UserError with the option that defines the row."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.option}: {error}" if self.option else str(error)) from None

    def recipe(self, base: Recipe) -> Recipe:
        """Return the recipe with the overrides, validated for a comparison.

        If a row changes `loss.method`, the options of the recipe's own method do not apply.
        """
        content = copy.deepcopy(base.content())
        method = self.overrides.get("loss.method", base.method)
        if method != base.method:
            content["loss"] = {}
        with self.named():
            for name in sorted(self.overrides, key=lambda name: name.count(".")):
                set_option(content, name, copy.deepcopy(self.overrides[name]))
            return recipe_from_dict(content, "compare")


def cacheable(recipe: Recipe) -> bool:
    """Return whether a run can use a teacher cache, which needs all rows and has no attention and no student's answers."""
    return not (recipe.loss.needs_attention or recipe.training.get("lmbda") or recipe.data.streaming)


@dataclass(frozen=True)
class Cell:
    """A run: a variant with a training seed."""

    variant: Variant
    seed: int
    search: bool = False

    @property
    def name(self) -> str:
        """Name of the run, unique in the comparison and valid as a folder name."""
        return f"{self.variant.folder_name}-{self.seed}"

    def recipe(self, base: Recipe) -> Recipe:
        """Return the recipe of this run."""
        recipe = self.variant.recipe(base)
        training = {**recipe.training, "seed": self.seed, "data_seed": self.seed}
        if self.variant.rate_factor != 1:
            rates = {"learning_rate": 5e-4, "projector_learning_rate": 1e-3} | recipe.training
            for name in ("learning_rate", "projector_learning_rate"):
                training[name] = float(f"{rates[name] * self.variant.rate_factor:.3g}")
        evaluation = recipe.evaluation
        if self.search:
            training |= {"load_best_model_at_end": False, "save_strategy": "no"}
            evaluation = evaluation.model_copy(update={"test": [], "text": []})
        teachers = recipe.teachers
        if not cacheable(recipe):
            teachers = [teacher.model_copy(update={"cache": None, "cache_dtype": None}) for teacher in teachers]
        with self.variant.named():
            return recipe.replace(teacher=teachers or None, training=training, evaluation=evaluation, compare=None)


def is_teacher(name: str) -> bool:
    """Return whether a row of the tables is a teacher, which is evaluated but not trained."""
    return re.fullmatch(r"teacher( \d+)?", name) is not None


def _is_default(options: MethodOptions, lmbda: float) -> bool:
    """Return whether a method works with two tokenizers and with this share of prompts that the student answers."""
    on_policy = options.supports_sampled and not (lmbda == 1 and options.needs_given)
    return not options.needs_same_vocabulary and (on_policy or not lmbda)


def variants_of(recipe: Recipe, section: CompareSection, *, ablation: bool) -> list[Variant]:
    """Return the rows of the comparison, validated.

    The recipe's own method also has the options of the `loss` section. In an ablation this applies to every row of that
    method.

    Raises:
        UserError: the compare section names an unknown method, or a row has an unsuitable name or an invalid option.
    """
    rows = {name: _row(name, overrides) for name, overrides in section.rows.items()}
    own, lmbda = recipe.loss, recipe.training.get("lmbda", 0)
    options = {name: own if name == own.method_name() else method_options(name) for name in METHODS}
    default = [name for name, one in options.items() if _is_default(one, lmbda)]
    chosen = _whole_names(section.methods, rows)
    for name in chosen:
        if name not in rows and name not in METHODS:
            valid = ", ".join(repr(one) if "," in one else one for one in dict.fromkeys([*rows, *METHODS]))
            raise UserError(f"unknown method {name!r} in compare.methods; valid ones: {valid}")
    names = dict.fromkeys(chosen or list(rows) or default)
    variants = [rows.get(name) or Variant(name, {"loss.method": name}) for name in names]
    if ablation:
        no_warmup = {"loss.gate_warmup_steps": 0} if getattr(own, "gate_warmup_steps", 0) else {}
        variants = [
            Variant(name, overrides | (no_warmup if "loss.gate" in overrides else {}))
            for name, overrides in ABLATION.items()
        ]
    folders: dict[str, str] = {}
    for variant in [*rows.values(), *variants]:
        other = folders.setdefault(variant.folder_name, variant.name)
        if other != variant.name:
            raise UserError(f"the rows {other!r} and {variant.name!r} would have the same folder: rename one")
        variant.recipe(recipe)
    return variants


def _whole_names(names: Sequence[str], rows: Collection[str]) -> list[str]:
    """Join names that a comma in the name of a row has divided: `--methods` separates names by commas."""
    found, left = [], list(names)
    while left:
        count = next((n for n in range(len(left), 1, -1) if ", ".join(left[:n]) in rows), 1)
        found.append(", ".join(left[:count]))
        del left[:count]
    return found


def _row(name: str, overrides: dict[str, Any]) -> Variant:
    """Return a row of `compare.rows` whose name and options suit a comparison."""
    option = f"compare.rows.{name}"
    if not _NAME.fullmatch(name) or is_teacher(name):
        raise UserError(
            f"{option}: a name consists of letters, digits, spaces and _.,+=- and is not that of a teacher; rename the row"
        )
    for key in overrides:
        if _FIXED.match(key) or not _CHANGEABLE.match(key):
            raise UserError(
                f"{option}.{key} cannot be set: a row sets single options of student, teacher, data, loss and training, such "
                "as training.learning_rate, or the whole loss or teacher; test sets and their columns, data.eval and seeds "
                "are those of all rows"
            )
    return Variant(name, overrides, option=option)


def sft_row(variants: list[Variant], recipe: Recipe) -> str | None:
    """Return the name of the row to compare the others with: `sft`, or else the first with this method and the same data."""
    fitting = [
        variant.name
        for variant in variants
        if variant.name == "sft"
        or (variant.recipe(recipe).method == "sft" and not any(name.startswith("data.") for name in variant.overrides))
    ]
    return "sft" if "sft" in fitting else next(iter(fitting), None)


def search_of(variant: Variant, recipe: Recipe) -> list[Variant]:
    """Return the variants of the search: three learning rates, and two weights of distillation if the row has one.

    The weight is the method's option `kd_rate`, `kd_weight` or else its first weight apart from the cross-entropy's. In a
    sum of methods, the weights of all methods change together.
    """
    row = variant.recipe(recipe)
    changes: dict[str, dict[str, Any]] = {"": {}}
    if weights := _distillation_weights(row.loss):
        changes = {}
        for share in SHARES:
            content = {"loss": row.content()["loss"]}
            for name, value in weights.items():
                set_option(content, name, value * share)
            changes[f"-weight{share:g}"] = content
    others = {name: value for name, value in variant.overrides.items() if not re.match(r"loss(\.|$)", name)}
    return [
        Variant(
            f"{variant.name}-lr{factor:.2g}{suffix}",
            {**(others if change else variant.overrides), **change},
            factor,
            variant.option,
        )
        for factor in RATES
        for suffix, change in changes.items()
    ]


def _distillation_weights(loss: MethodOptions, prefix: str = "loss.") -> dict[str, float]:
    """Return the option that is the weight of distillation, by its dotted name; for a sum those of all methods."""
    if isinstance(loss, SumOptions):
        parts = (_distillation_weights(part, f"{prefix}{number}.") for number, part in enumerate(loss.losses, start=1))
        return {name: value for part in parts for name, value in part.items()}
    others = [name for name in type(loss).model_fields if name.endswith("_weight") and name != "ce_weight"]
    name = next((name for name in ("kd_rate", "kd_weight", *others) if hasattr(loss, name)), None)
    return {} if name is None else {f"{prefix}{name}": float(getattr(loss, name))}
