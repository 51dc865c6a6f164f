"""ALM: match the likelihoods of text chunks that both tokenisations share (arXiv 2503.20083)."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.align.offsets import ByteGroups, byte_groups, sum_by_group, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, CrossEntropy, head_loss
from dwakd.kernels.head_loss.statistics import infinite_if_forbidden
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import cross_entropy
from dwakd.losses.options import LARGEST, MethodOptions, Weight

PerChunk = Float[Tensor, " chunks"]
PerRow = Float[Tensor, " rows"]


class AlmOptions(MethodOptions):
    """Options of `AlmLoss`."""

    method: Literal["alm"] = "alm"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy.")
    alm_weight: Weight = Field(
        100.0,
        description="Weight of the chunk term. The gradient of f is about 1 / tau_b of that of the cross-entropy, and the "
        "default compensates for this. The published code balances the two gradients at every step (GradMag); "
        "this needs the gradients of all ranks and is not implemented. A port without it uses 3.",
    )
    chunk_temperature: Annotated[float, Field(ge=1e-3, le=LARGEST)] = Field(
        100.0, description="Temperature tau_b. The paper uses 100."
    )
    epsilon: Annotated[float, Field(ge=1e-6, le=1)] = Field(
        1e-06,
        description="Subtracted from the log-likelihoods divided by tau_b, so that a chunk of probability 1 has a finite "
        "gradient.",
    )
    chunk_weights: Literal["chunk_count", "token_count"] = Field(
        "chunk_count",
        description="'chunk_count' gives all chunks of an example the same weight; 'token_count' weighs them by their student "
        "tokens, where the published code uses teacher tokens. The weights of an example sum to its student "
        "tokens.",
    )


class AlmLoss(DistillationLoss[AlmOptions]):
    """Match the probabilities that both models assign to each chunk of text.

        L = ce_weight CE + alm_weight sum_c w_c f(l^t_c, l^s_c)

    A chunk c is the smallest pair of token spans that start and end at the same bytes. l_c is the log-probability that a
    model assigns to the text of the chunk, and f is the binary cross-entropy of e^(l / tau_b). Only the log-probabilities of
    the target tokens are needed, so there is no map between the vocabularies.

    Gradient: the student's hidden states and head, through l^s. The minimum, at l^s = l^t, is above 0.

    References:
        Minixhofer et al. 2025. Official code: bminixhofer/tokenkit, `alm_unconstrained`. Its debiasing of chunk ends and its
        merging of chunks by the probability of a space are not implemented.
    """

    options_type = AlmOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "alm")

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        with torch.no_grad():
            known = -head_loss([constant_rows(teacher)], CrossEntropy(teacher.target_ids), by_row=True).loss
        likelihoods = sum_by_group(known, groups.teacher, len(student.target_ids))
        matching = ChunkMatching(self.options, student, groups, likelihoods)
        output = head_loss([head_rows(student)], matching)
        ce = output.statistics["ce"]
        sums = {"ce": ce.sum(), "alm": matching.value(ce, torch.arange(len(ce), device=ce.device))}
        sums = {name: infinite_if_forbidden(value) for name, value in sums.items()}
        # the loss of `head_loss` is linear in the log-probabilities: it has the right gradient but another value
        value = self.options.ce_weight * sums["ce"] + self.options.alm_weight * sums["alm"]
        return Terms(sums, value + output.loss - output.loss.detach())


class ChunkMatching(Criterion):
    """Compute the cross-entropy of each token, weighted by the derivative of the whole loss with respect to it.

    The derivative depends on the likelihoods of whole chunks, so it is computed from whole examples.

    Args:
        options of the method.
        student: the student's side.
        groups: the chunks of the batch.
        teacher_likelihoods: log-likelihood of each chunk. Entries after the last chunk are unused.
    """

    unit = "weights"

    def __init__(
        self, options: AlmOptions, student: ModelSide, groups: ByteGroups, teacher_likelihoods: PerChunk
    ) -> None:
        super().__init__({"ce": 1.0})
        self.options, self.targets, self.groups = options, student.target_ids, groups.student
        self.teacher_likelihoods = teacher_likelihoods
        even = options.chunk_weights == "chunk_count"
        self.chunk_weights = tokens_per_group(groups, student.lengths, even=even)

    def value(self, ce: PerRow, rows: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        """Compute the weighted sum of f over the chunks of whole examples.

        Args:
            ce: cross-entropy of each token.
            rows: their positions in the packed batch. If they are not all of the batch, the value has a constant offset.
        """
        groups = self.groups[rows]
        # entries after the last chunk of these tokens do not depend on them
        chunks = (groups[0] + torch.arange(len(ce), device=ce.device)).clamp(max=len(self.groups) - 1)
        losses = binary_cross_entropy(
            self.teacher_likelihoods[chunks],
            sum_by_group(-ce, groups - groups[0], len(ce)),
            self.options.chunk_temperature,
            self.options.epsilon,
        )
        return (losses * self.chunk_weights[chunks]).sum()

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        ce = cross_entropy(logits[0].t(), self.targets[chunk.rows[0]])
        return {"ce": ce if weights is None else weights * ce}

    def statistics(self, logits: Sequence[Tensor], chunk: Chunk) -> dict[str, Tensor]:
        rows = torch.arange(chunk.rows[0].start, chunk.rows[0].stop, device=self.targets.device)
        return {**self.terms(logits, chunk, None), "row": rows}

    def weights(self, statistics: dict[str, Tensor], lengths: Int[Tensor, " batch"] | None) -> PerRow:
        with torch.enable_grad():
            ce = statistics["ce"].detach().requires_grad_()
            loss = self.options.ce_weight * ce.sum() + self.options.alm_weight * self.value(ce, statistics["row"])
            slope: Tensor
            (slope,) = torch.autograd.grad(loss, ce)
        return slope


def binary_cross_entropy(
    teacher_likelihoods: PerChunk,
    student_likelihoods: PerChunk,
    temperature: float,
    epsilon: Annotated[float, Field(ge=1e-6, le=1)],
) -> PerChunk:
    """Compute the binary cross-entropy of each chunk's likelihoods to the power of 1 / temperature.

        -[e^u v + (1 - e^u) log(1 - e^v)]

    u and v are the log-likelihoods of teacher and student divided by the temperature, minus epsilon.

    Args:
        teacher_likelihoods: log-likelihoods; values above 0, from rounding, are set to 0.
        student_likelihoods: log-likelihoods, with gradient; values above 0 are set to 0.
        temperature: tau_b.
        epsilon: keeps u and v below 0.
    """
    u = teacher_likelihoods.clamp(max=0) / temperature - epsilon
    v = student_likelihoods.clamp(max=0) / temperature - epsilon
    return -(u.exp() * v - torch.expm1(u) * log1mexp(v))


def log1mexp(x: PerChunk) -> PerChunk:
    """Compute log(1 - e^x) for x < 0, accurate for all x."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
