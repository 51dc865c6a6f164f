"""Base class of the options of a method, and the types of their values."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from dwakd.errors import UserError
from dwakd.validation import Section

LARGEST = 1e30
"""Upper bound of every numeric option. The product of an option and a term stays finite in float32."""

Count = Annotated[int, Field(ge=1, le=10**9)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Weight = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(ge=1e-6, le=LARGEST)]
Rate = Annotated[float, Field(ge=0, le=1)]
# The fused kernels compute softmax(x) from exp(x / temperature), which has a relative error of 1e-7 x temperature.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
Softening = Annotated[
    Temperature, Field(description="Divides the logits of both models in the divergences. There is no tau^2 factor.")
]
Skew = Annotated[Rate, Field(description="Parameter lambda of the skewed divergences.")]


class MethodOptions(Section):
    """Base class of the options of a method. It also says what the method needs of the two models."""

    needs_teacher: ClassVar[bool] = True
    needs_models: ClassVar[Literal["widths", "pair"] | None] = None
    """Argument of the loss's constructor besides the options: `widths` (`Widths`), `pair` (`ModelPair`), or none."""
    needs_only_log_probs: ClassVar[bool] = False
    """Whether the log-probabilities of the response's tokens are all that the method needs of the teacher."""
    needs_edit_alignment: ClassVar[bool] = False
    """Whether the method reads `aligned_rows` of the teacher's side."""
    variant_defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    """Defaults that an option named `variant` replaces, by its value."""

    @classmethod
    def method_name(cls) -> str:
        """Return the name of the method."""
        (name,) = get_args(cls.model_fields["method"].annotation)
        return str(name)

    @classmethod
    def owner(cls) -> str:
        return f" of method {cls.method_name()}"

    @property
    def parts(self) -> "list[MethodOptions]":
        """The options of each method of a sum; of a single method, only these options."""
        return [self]

    @property
    def cross_entropy_weight(self) -> float:
        """Weight of the cross-entropy: the option `ce_weight`, or else 1 - `kd_rate`, or else 1."""
        rest: float = 1.0 - getattr(self, "kd_rate", 0.0)
        return getattr(self, "ce_weight", rest)

    @property
    def supports_sampled(self) -> bool:
        """Whether the method can train on responses that the student sampled, which are not correct answers."""
        return True

    @property
    def needs_given(self) -> bool:
        """Whether some responses must be given, because maps of the method learn nothing from sampled ones."""
        return False

    @property
    def needs_same_vocabulary(self) -> bool:
        """Whether student and teacher must have the same tokenizer."""
        return False

    @property
    def needs_attention(self) -> bool:
        """Whether the method reads `attention` of both sides."""
        return False

    @model_validator(mode="wrap")
    @classmethod
    def _apply_variant(cls, values: Any, validate: Callable[[Any], Any]) -> Any:
        if not cls.variant_defaults or not isinstance(values, dict):
            return validate(values)
        defaults = cls.variant_defaults.get(str(values.get("variant")), {})
        given = {n: value for n, value in values.items() if value is not None or n not in cls.model_fields}
        options = validate({**defaults, **given})
        options.model_fields_set.intersection_update(values)  # defaults that `variant` replaced were not given
        return options


def refuse_served(options: MethodOptions) -> None:
    """Raise UserError if a method needs more of the teacher than the log-probabilities that a server gives."""
    for part in options.parts:
        if part.needs_teacher and not part.needs_only_log_probs:
            raise UserError(
                f"method {part.method_name()} needs the teacher's hidden states, but a server (teacher.url) gives only "
                "log-probabilities of the response: set loss.method=alm, or load the teacher without teacher.url"
            )
