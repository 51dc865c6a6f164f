"""Plan the runs of a comparison: methods, rows of an ablation or a search, each with several training seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dwakd.errors import UserError
from dwakd.losses import METHODS, method_class, method_options
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import CompareSection

_NO_WEIGHTS = {"entropy_weights": False, "gate": False, "teacher_weights": False}
_NO_ALIGNMENT = {"dtw_hidden": False, "dtw_embedding": False}
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "dskd": ("dskd", {}),
    "dskd + entropy weights": ("dwa_kd", {"gate": False, **_NO_ALIGNMENT}),
    "dskd + dtw": ("dwa_kd", {**_NO_WEIGHTS, "band": False}),
    "dskd + banded dtw": ("dwa_kd", _NO_WEIGHTS),
    "dwa_kd without gate": ("dwa_kd", {"gate": False}),
    "dwa_kd": ("dwa_kd", {}),
}
"""Method and options of each row of DWA-KD's table 3."""
RATES, SHARES = (1 / 3, 1.0, 3.0), (0.5, 1.0)
"""Factors of the search, for the learning rates and for the weight of distillation."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method with options."""

    name: str
    method: str
    options: dict[str, Any]
    rate_factor: float = 1.0

    @property
    def folder_name(self) -> str:
        """The name as a valid folder name."""
        return self.name.replace(" ", "_").replace("+", "plus")


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

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe of this run."""
        training = {**recipe.training, "seed": self.seed, "data_seed": self.seed}
        if self.variant.rate_factor != 1:
            base = {"learning_rate": 5e-4, "projector_learning_rate": 1e-3} | recipe.training
            for name in ("learning_rate", "projector_learning_rate"):
                training[name] = float(f"{base[name] * self.variant.rate_factor:.3g}")
        evaluation = recipe.evaluation
        if self.search:
            training |= {"load_best_model_at_end": False, "save_strategy": "no"}
            evaluation = evaluation.model_copy(update={"test": []})
        teachers = recipe.teachers
        if method_options(self.variant.method, self.variant.options).needs_attention:  # a cache contains no attention
            teachers = [teacher.model_copy(update={"cache": None, "cache_dtype": None}) for teacher in teachers]
        loss = {"method": self.variant.method, **self.variant.options}
        changed = {"loss": loss, "teacher": teachers or None, "training": training, "evaluation": evaluation}
        return recipe.replace(**changed, compare=None)


def variants_of(recipe: Recipe, section: CompareSection, *, ablation: bool) -> list[Variant]:
    """Return the rows of the comparison.

    The recipe's own method also gets the options of the `loss` section, unless `compare.options` sets them. In an
    ablation this applies to every row of that method.

    Raises:
        UserError: the compare section names an unknown method, options of a method that is not compared, or an invalid
            option.
    """
    for method in section.methods:
        method_class(method, "compare.methods")
    methods = section.methods or [name for name in METHODS if not method_options(name).needs_same_vocabulary]
    rows = ABLATION if ablation else {name: (name, {}) for name in methods}
    known = dict.fromkeys([*methods, *(method for method, _ in rows.values())])
    for name, options in section.options.items():
        if name not in known:
            raise UserError(f"compare.options names {name}, which is not among the compared methods {', '.join(known)}")
        method_options(name, options, f"compare.options.{name}.")
    given = section.options | {recipe.method: recipe.loss_options | section.options.get(recipe.method, {})}
    return [Variant(name, method, {**given.get(method, {}), **options}) for name, (method, options) in rows.items()]


def search_of(variant: Variant) -> list[Variant]:
    """Return the variants of the search: three learning rates, and two weights of distillation if the method has one.

    The weight is the method's option `kd_rate`, `kd_weight` or else its first weight apart from the cross-entropy's.
    """
    known = method_options(variant.method, variant.options)
    others = [name for name in type(known).model_fields if name.endswith("_weight") and name != "ce_weight"]
    weight = next((name for name in ("kd_rate", "kd_weight", *others) if hasattr(known, name)), None)
    changes: dict[str, dict[str, float]] = {"": {}}
    if weight is not None:
        usual = float(getattr(known, weight))
        changes = {f"-{weight}{usual * share:g}": {weight: usual * share} for share in SHARES}
    return [
        Variant(f"{variant.name}-lr{factor:.2g}{suffix}", variant.method, {**variant.options, **change}, factor)
        for factor in RATES
        for suffix, change in changes.items()
    ]
