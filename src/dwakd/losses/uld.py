"""ULD: compare sorted probabilities rank by rank, for any two vocabularies (arXiv 2402.12030)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, HeadRows, head_loss
from dwakd.losses.base import DistillationLoss, Terms, head_rows
from dwakd.losses.columns import cross_entropy
from dwakd.losses.divergences import sorted_difference
from dwakd.losses.options import MethodOptions, Temperature, Weight
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids, positions


class UldOptions(MethodOptions):
    variant_defaults = {"dskd": {"ce_weight": 0.5, "uld_weight": 0.5}}  # noqa: RUF012
    method: Literal["uld"] = "uld"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy. The paper uses 1, variant dskd 0.5.")
    uld_weight: Weight = Field(1.5, description="Weight lambda of the distance. The paper uses 1.5, variant dskd 0.5.")
    temperature: Temperature = Field(
        1.0, description="Divides the logits of both models in the distance. The paper and all ports use 1."
    )
    variant: Literal["paper", "dskd"] = Field(
        "paper",
        description="paper takes the mean over the pairs of each example and weighs examples by their student tokens; dskd, "
        "the port that produced the tables of DSKD, takes the plain sum over the pairs.",
    )


class UldLoss(DistillationLoss[UldOptions]):
    """Compare the two models' sorted probabilities at each position, without matching any tokens.

        L = ce_weight CE + uld_weight sum_b S_b / n_b sum_{k <= n_b} sum_i |p^s_{k,(i)} - p^t_{k,(i)}|

    Example b has S_b student tokens, T_b teacher tokens and n_b = min(S_b, T_b) pairs: position k of the student's
    response is compared with position k of the teacher's. p_(i) is the i-th largest probability, and 0 beyond the end of
    the smaller vocabulary. This is the Wasserstein distance between two sets of values; it ignores which tokens they
    belong to. It lies between 0 and 2 for each pair.

    Gradient: the student's hidden states and head, through both terms. It is piecewise linear in the probabilities.

    References:
        Boizard et al. 2024, equation 6. The paper gives all examples of a batch equal weight. With weights by student
        tokens, gradient accumulation and ranks do not change the loss.
    """

    options_type = UldOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "uld")

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        options = self.options
        rows, weights = paired_rows(student, teacher, mean=options.variant == "paper")
        opposite = HeadRows(teacher.hidden.detach()[rows], teacher.head.detached(), student.lengths)
        return Terms.of(
            head_loss([head_rows(student), opposite], SortedDifference(options, student.target_ids, weights, ce_weight))
        )


def paired_rows(
    student: ModelSide, teacher: ModelSide, *, mean: bool
) -> tuple[Int[Tensor, " s_tokens"], Float[Tensor, " s_tokens"]]:
    """Find the teacher's token at the same position of the response for each student token, and the pair's weight.

    The weight is S_b / n_b (see `UldLoss`) if `mean` is true, else 1. Student tokens after the end of the teacher's
    response get the teacher's last token and the weight 0.
    """
    example, place = (part(student.lengths, len(student.target_ids)) for part in (example_ids, positions))
    lengths = teacher.lengths[example]
    starts = (teacher.lengths.cumsum(0) - teacher.lengths)[example]
    pairs = torch.minimum(student.lengths, teacher.lengths)
    factor = (student.lengths / pairs)[example] if mean else torch.ones_like(lengths, dtype=torch.float32)
    return starts + torch.minimum(place, lengths - 1), torch.where(place < lengths, factor, 0.0)


class SortedDifference(Criterion):
    """Compute the terms `ce` and `uld` = weight x sum_i |p_(i) - q_(i)| of the student's p and the teacher's q."""

    def __init__(
        self,
        options: UldOptions,
        targets: Int[Tensor, " tokens"],
        weights: Float[Tensor, " tokens"],
        ce_weight: float,
    ) -> None:
        super().__init__({"ce": ce_weight, "uld": options.uld_weight})
        self.targets, self.pair_weights, self.temperature = targets, weights, options.temperature

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        rows = chunk.rows[0]
        scaled = logits if self.temperature == 1 else [side / self.temperature for side in logits]
        own, theirs = (side.softmax(-1) for side in scaled)
        distance = sorted_difference(theirs.detach(), own)
        ce = cross_entropy(logits[0].t(), self.targets[rows])
        return {"ce": ce, "uld": self.pair_weights[rows].to(distance.dtype) * distance}
