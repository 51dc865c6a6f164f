"""ALM: match the likelihoods of text chunks that both tokenisations share (arXiv 2503.20083)."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.align.offsets import byte_groups, sum_by_group, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, CrossEntropy, active_weights, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import cross_entropy
from dwakd.losses.options import LARGEST, MethodOptions, Weight
from dwakd.losses.scale import TeacherScale

PerChunk = Float[Tensor, " chunks"]


class AlmOptions(MethodOptions):
    needs_only_log_probs = True
    method: Literal["alm"] = "alm"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy.")
    alm_weight: Weight = Field(
        100.0,
        description="Weight of the chunk term, whose gradient is about 1 / tau_b of that of the cross-entropy. The published "
        "code balances the two gradients at every step (GradMag) instead; a port without it uses 3.",
    )
    chunk_temperature: Annotated[float, Field(ge=1e-3, le=LARGEST)] = Field(
        100.0, description="Temperature tau_b. The paper uses 100."
    )
    epsilon: Annotated[float, Field(ge=1e-6, le=1)] = Field(
        1e-06, description="Subtracted from l / tau_b, so that a chunk of probability 1 has a finite gradient."
    )
    chunk_weights: Literal["chunk_count", "token_count"] = Field(
        "chunk_count",
        description="chunk_count gives all chunks of an example the same weight; token_count weighs them by their student "
        "tokens (teacher tokens in the published code). The weights of an example sum to its student tokens.",
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

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        options, count = self.options, len(student.target_ids)
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        weights = tokens_per_group(groups, student.lengths, even=options.chunk_weights == "chunk_count")
        with torch.no_grad():
            own, theirs = (
                head_loss([constant_rows(side)], CrossEntropy(side.target_ids), by_row=True).terms["ce"]
                if side.target_log_probs is None
                else -side.target_log_probs
                for side in (student, teacher)
            )
        # A chunk's term depends on all of its tokens. So the derivative by each token's cross-entropy is computed first, and
        # a second pass over the head multiplies it with the derivative of the cross-entropy.
        with torch.enable_grad():
            likelihoods = (
                sum_by_group(-theirs, groups.teacher, count),
                sum_by_group(-own.requires_grad_(), groups.student, count),
            )
            losses = binary_cross_entropy(*likelihoods, options.chunk_temperature, options.epsilon)
            sums = {"ce": own.sum(), "alm": (losses * weights).sum()}
            term_weights = active_weights({"ce": ce_weight, "alm": options.alm_weight})
            value = torch.stack([term_weights[name] * term for name, term in sums.items()]).sum()
            slope: Tensor
            (slope,) = torch.autograd.grad(value, own)
        linear = head_loss([head_rows(student)], WeightedCrossEntropy(student.target_ids, slope)).loss
        return Terms(sums, value.detach() + linear - linear.detach())


class WeightedCrossEntropy(Criterion):
    """Compute the cross-entropy of each token times a constant."""

    def __init__(self, targets: Int[Tensor, " tokens"], factors: Float[Tensor, " tokens"]) -> None:
        super().__init__({})
        self.rates = {"ce": 1.0}  # in `only_term` too, because the factors contain the weights of all terms
        self.targets, self.factors = targets, factors

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        rows = chunk.rows[0]
        return {"ce": self.factors[rows] * cross_entropy(logits[0].t(), self.targets[rows])}


def binary_cross_entropy(teacher: PerChunk, student: PerChunk, temperature: float, epsilon: float) -> PerChunk:
    """Compute the binary cross-entropy of each chunk's likelihoods to the power of 1 / temperature.

        -[e^u v + (1 - e^u) log(1 - e^v)]

    u and v are the log-likelihoods of teacher and student, at most 0, divided by the temperature, minus epsilon.
    """
    u, v = (side.clamp(max=0) / temperature - epsilon for side in (teacher, student))
    return -(u.exp() * v - torch.expm1(u) * log1mexp(v))


def log1mexp(x: PerChunk) -> PerChunk:
    """Compute log(1 - e^x) for x < 0, accurate for all x."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
