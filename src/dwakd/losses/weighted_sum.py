"""Sum: add the losses of several methods with weights, and one cross-entropy."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import only_part
from dwakd.losses.base import DistillationLoss, Projection, Terms
from dwakd.losses.methods import METHODS
from dwakd.losses.options import MethodOptions, Positive
from dwakd.losses.pair import ModelPair, Widths
from dwakd.losses.scale import TeacherScale

SUM = "sum"


def _with_weight(options: type[MethodOptions]) -> type[MethodOptions]:
    """Return the options of a method with a weight, and with a method that must be given."""
    method: Any = (options.model_fields["method"].annotation, ...)
    weight: Any = (Positive, Field(1.0, description="Weight of the method's loss in the sum."))
    name = options.__name__.removesuffix("Options") + "Part"
    return create_model(name, __base__=options, method=method, weight=weight)


if TYPE_CHECKING:
    Part: TypeAlias = MethodOptions
else:
    Part = Annotated[
        functools.reduce(operator.or_, (_with_weight(method.options_type) for method in METHODS.values())),
        Field(discriminator="method"),
    ]


def _any_part(name: str) -> Any:
    return property(lambda self: any(getattr(part, name) for part in self.losses))


class SumOptions(MethodOptions):
    method: Literal["sum"] = "sum"
    losses: list[Part] = Field(
        description="The methods, each with its options and a weight (1 by default). In a recipe, the section loss may be "
        "this list itself."
    )
    needs_teacher: ClassVar[Any] = _any_part("needs_teacher")
    needs_edit_alignment: ClassVar[Any] = _any_part("needs_edit_alignment")
    needs_same_vocabulary: ClassVar[Any] = _any_part("needs_same_vocabulary")
    needs_attention: ClassVar[Any] = _any_part("needs_attention")
    needs_given: ClassVar[Any] = _any_part("needs_given")

    @property
    def needs_models(self) -> Literal["widths", "pair"] | None:  # type: ignore[override]
        """What the parts need; a pair contains the widths."""
        return max((part.needs_models for part in self.losses), key=(None, "widths", "pair").index)

    @property
    def parts(self) -> list[MethodOptions]:
        return self.losses

    @property
    def names(self) -> list[str]:
        """The methods of the parts."""
        return [part.method_name() for part in self.losses]

    @property
    def weights(self) -> list[float]:
        """The weights of the parts."""
        return [part.weight for part in self.losses]  # type: ignore[attr-defined]

    @property
    def cross_entropy_weight(self) -> float:
        """Weight of the cross-entropy: that of the first part times the part's weight."""
        return self.weights[0] * self.losses[0].cross_entropy_weight

    @property
    def supports_sampled(self) -> bool:
        others = [part for part in self.losses if part.method_name() != "sft"]  # which has only the cross-entropy
        return bool(others) and all(part.supports_sampled for part in others)

    @model_validator(mode="after")
    def _check_parts(self) -> "SumOptions":
        names = self.names
        if not names:
            raise ValueError("a sum needs at least one method")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"each method of a sum must be given once, and {twice[0]} is given twice")
        for number, part in enumerate(self.losses[1:], start=2):
            if names[number - 1] == "sft" or "ce_weight" in part.model_fields_set:
                fault = "sft" if names[number - 1] == "sft" else f"ce_weight of {names[number - 1]}"
                raise ValueError(
                    f"{fault} in part {number} has no effect, because the cross-entropy of a sum is that of its first "
                    "method: leave it out or put it first"
                )
        return self


class WeightedSumLoss(DistillationLoss[SumOptions]):
    """Add the losses of several methods.

        L = w_1 L_1 + sum_{k > 1} w_k (L_k without its cross-entropy)

    The cross-entropy is that of the first method, with the weight that the first method gives it times w_1. All other terms
    have the names METHOD.TERM, such as `dwa_kd.t2s_ce` and `alm.alm`. With several teachers, the gate is that of the first
    method that has one, and it applies to all methods that use gate weights.

    In a recipe: `loss: [{method: dwa_kd, variant: recommended}, {method: alm, weight: 0.5}]`; in Python:
    `DistillConfig(method="sum", loss_options={"losses": [...]})` with the same list. An override names a part by its number,
    counted from 1: `loss.2.weight=0.3`.
    """

    options_type = SumOptions

    def __init__(self, *, widths: Widths | None = None, pair: ModelPair | None = None, **options: Any) -> None:
        super().__init__(**options)
        models = {"pair": pair, "widths": widths if pair is None else pair.widths, None: None}
        self.parts = nn.ModuleDict()
        for name, part in zip(self.options.names, self.options.losses, strict=True):
            own = part.model_dump(exclude={"method", "weight"}, exclude_unset=True)
            needs = part.needs_models
            self.parts[name] = METHODS[name](**({needs: models[needs]} if needs else {}), **own)
        self.vocabularies = next((loss.vocabularies for loss in self._losses if loss.vocabularies is not None), None)

    @property
    def terms(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the terms that the methods can report, in addition to `loss`."""
        return term_names(self.options)

    @property
    def given_terms(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the terms whose labels are the given responses."""
        parts = zip(self.parts, self._losses, strict=True)
        return "ce", *(f"{name}.{term}" for name, loss in parts for term in loss.given_terms)

    @property
    def _losses(self) -> list[DistillationLoss[Any]]:
        return list(self.parts.values())  # type: ignore[arg-type]

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        sums: dict[str, Tensor] = {}
        factors: dict[str, float] = {}
        totals: list[Tensor] = []
        for name, loss, weight in zip(self.parts, self._losses, self.options.weights, strict=True):
            with only_part(name):
                found = loss.compute(student, teacher, scale, 0.0 if totals else ce_weight / weight)
            totals.append(weight * found.total)
            for term, value in found.sums.items():
                sums.setdefault(term if term == "ce" else f"{name}.{term}", value)
            factors |= {f"{name}.{term}": weight * factor for term, factor in found.weights.items()}
        return Terms(sums, torch.stack(totals).sum(), factors)

    def set_step(self, step: int) -> None:
        for loss in self._losses:
            loss.set_step(step)

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection | None:
        found = (loss.projected(student, teacher, teacher_scale) for loss in self._losses)
        return next((projection for projection in found if projection is not None), None)


def term_names(options: MethodOptions) -> tuple[str, ...]:
    """Return the names of the terms that a method with these options can report, in addition to `loss`."""
    if not isinstance(options, SumOptions):
        return METHODS[options.method_name()].terms
    own = [f"{name}.{term}" for name in options.names for term in METHODS[name].terms if term != "ce"]
    return "ce", *own
