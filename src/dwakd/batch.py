"""What passes between a model and a loss: response rows only, packed over the examples.

Axes: `batch` examples, `tokens` response positions of all the examples one after the other, `hidden` width of
the final hidden states, `embedding` width of the input-embedding table, `vocab` rows of the head. The prefixes
`s_` and `t_` say student and teacher where both occur. A response position is one whose *predicted* token belongs
to the response, end-of-sequence included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from dwakd.models.head import OutputHead


@dataclass(frozen=True)
class ModelSide:
    """One model's view of a batch.

    Args:
        hidden: final hidden states, the ones the head reads. The student's carry gradient.
        input_embeddings: embedding of the token read at each row; a constant.
        target_embeddings: embedding of the token predicted at each row. The student's carry gradient.
        target_ids: the token predicted at each row.
        lengths: rows per example, at least 1; they sum to tokens.
        byte_ends: offset in the response's UTF-8 bytes at which the predicted token ends (end-of-sequence: the length);
            a negative number inside text that the tokenizer's normalisation changed, see `TextEncoder.response_ids`.
        head: hidden rows to logits.
        aligned_rows: of a teacher whose method needs it: for each student token the teacher token that is paired with it by
            spelling, counted within the example; -1 for none.
        trust: of one of several teachers: what its word counts at each of the student's rows, relative to its share.
        attention: of a model whose method asks for it: how much the last position of a sequence attends to each row's in
            the last layer, summed over its heads; a constant.
    """

    hidden: Float[Tensor, "tokens hidden"]
    input_embeddings: Float[Tensor, "tokens embedding"]
    target_embeddings: Float[Tensor, "tokens embedding"]
    target_ids: Int[Tensor, " tokens"]
    lengths: Int[Tensor, " batch"]
    byte_ends: Int[Tensor, " tokens"]
    head: OutputHead
    aligned_rows: Int[Tensor, " s_tokens"] | None = None
    trust: Float[Tensor, " s_tokens"] | None = None
    attention: Float[Tensor, " tokens"] | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """`lengths` on the host: told by `with_counts`, else read once from the device, which waits for it."""
        return tuple(self.lengths.tolist())

    def with_counts(self, counts: Sequence[int] | None) -> "ModelSide":
        """This side, knowing the values of its `lengths`, if they are given."""
        if counts is not None:
            vars(self)["counts"] = tuple(counts)
        return self


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns.

    Args:
        loss: the weighted sum of the terms, in nats per student response token; carries gradient.
        terms: each term by its public name, unweighted, detached, in the same unit.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
