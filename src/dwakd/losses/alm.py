"""ALM: approximate likelihood matching over chunks that cover the same bytes (arXiv 2503.20083)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.align.offsets import ByteGroups, byte_groups, sum_by_group, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, CrossEntropy, head_loss
from dwakd.kernels.head_loss.statistics import infinite_if_forbidden, subtract_at
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    DistillationLoss,
    Terms,
    check_range,
    constant_rows,
    head_rows,
)

PerChunk = Float[Tensor, " chunks"]
PerRow = Float[Tensor, " rows"]
CHUNK_WEIGHTS = ("chunk_count", "token_count")


class AlmLoss(DistillationLoss):
    """L = ce_weight CE + alm_weight sum_c w_c f(l^t_c, l^s_c), f the binary cross-entropy of e^(l/tau_b).

    A chunk c is the smallest pair of spans that end at the same byte; l_c is the log-probability that a model gives to
    the text of the chunk. Only the log-probabilities of the realised tokens are needed: no map between vocabularies.

    Gradient: the student's rows and head, through l^s. The least value, where l^s = l^t, is not 0.

    Args:
        ce_weight: of the cross-entropy.
        alm_weight: of the chunks' term. A gradient of f is about 1/tau_b of one of the cross-entropy, so that the
            default puts the two on a par; the published code balances them at every step by the size of their
            gradients (GradMag), which needs all ranks and is left out. A port without it uses 3.
        chunk_temperature: tau_b; the paper uses 100.
        epsilon: taken off the log-likelihoods, so that a certain chunk has a finite gradient.
        chunk_weights: "chunk_count" weighs the chunks of an example alike, "token_count" each by its student tokens; an
            example weighs as many tokens as it has either way.

    Raises:
        ValueError: an option out of range or unknown.

    References:
        Minixhofer et al. 2025. Official code: bminixhofer/tokenkit, `alm_unconstrained`. Left out are
        the debiasing of chunk ends and the merging of chunks by the probability of a space.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "alm")

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        alm_weight: float = 100.0,
        chunk_temperature: float = 100.0,
        epsilon: float = 1e-6,
        chunk_weights: str = "chunk_count",
    ) -> None:
        super().__init__()
        infinite = float("inf")
        check_range(
            ce_weight=(ce_weight, 0, infinite),
            alm_weight=(alm_weight, 0, infinite),
            chunk_temperature=(chunk_temperature, 1e-3, infinite),
            epsilon=(epsilon, 1e-6, 1),
        )
        if chunk_weights not in CHUNK_WEIGHTS:
            raise ValueError(f"unknown chunk_weights {chunk_weights!r}; valid ones: {', '.join(CHUNK_WEIGHTS)}")
        self.ce_weight, self.alm_weight = ce_weight, alm_weight
        self.chunk_temperature, self.epsilon = chunk_temperature, epsilon
        self.chunk_weights = chunk_weights

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        with torch.no_grad():
            known = -head_loss([constant_rows(teacher)], CrossEntropy(teacher.target_ids), by_row=True).loss
        likelihoods = sum_by_group(known, groups.teacher, len(student.target_ids))
        matching = ChunkMatching(self, student, groups, likelihoods)
        output = head_loss([head_rows(student)], matching)
        ce = output.statistics["ce"]
        sums = {"ce": ce.sum(), "alm": matching.value(ce, torch.arange(len(ce), device=ce.device))}
        sums = {name: infinite_if_forbidden(value) for name, value in sums.items()}
        # the engine's loss is linear in the log-probabilities: its gradient is ours, its value is not
        value = self.ce_weight * sums["ce"] + self.alm_weight * sums["alm"]
        return Terms(sums, value + output.loss - output.loss.detach())


class ChunkMatching(CrossEntropy):
    """Cross-entropy of each row, weighted by what a change of it does to the whole loss.

    That derivative is known when the likelihoods of whole chunks are.

    Args:
        options: of the method.
        student: the rows.
        groups: the chunks of the batch.
        teacher_likelihoods: of each chunk, the log; entries beyond the last chunk are unused.
    """

    unit = "weights"

    def __init__(self, options: AlmLoss, student: ModelSide, groups: ByteGroups, teacher_likelihoods: PerChunk) -> None:
        super().__init__(student.target_ids)
        self.options, self.groups = options, groups.student
        self.teacher_likelihoods = teacher_likelihoods
        even = options.chunk_weights == "chunk_count"
        self.chunk_weights = tokens_per_group(groups, student.lengths, even=even)

    def value(self, ce: PerRow, rows: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        """The weighted sum of f over the chunks of these rows, which are whole examples; up to a constant if some."""
        groups = self.groups[rows]
        # those beyond the last chunk of these rows depend on none of them
        chunks = (groups[0] + torch.arange(len(ce), device=ce.device)).clamp(max=len(self.groups) - 1)
        losses = binary_cross_entropy(
            self.teacher_likelihoods[chunks],
            sum_by_group(-ce, groups - groups[0], len(ce)),
            self.options.chunk_temperature,
            self.options.epsilon,
        )
        return (losses * self.chunk_weights[chunks]).sum()

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        ce = super().terms(logits, chunk, None)["ce"]
        return {"ce": ce if weights is None else weights * ce}

    def statistics(self, logits: Sequence[Tensor], chunk: Chunk) -> dict[str, Tensor]:
        return {**super().terms(logits, chunk, None), "row": self._rows(chunk)}

    def observe(self, logits: Sequence[Tensor], chunk: Chunk) -> dict[str, Tensor]:
        return {**super().observe(logits, chunk), "row": self._rows(chunk)}

    def _rows(self, chunk: Chunk) -> Int[Tensor, " rows"]:
        return torch.arange(chunk.rows[0].start, chunk.rows[0].stop, device=self.targets.device)

    def weights(self, statistics: dict[str, Tensor], lengths: Int[Tensor, " batch"] | None) -> PerRow:
        with torch.enable_grad():
            ce = statistics["ce"].detach().requires_grad_()
            loss = self.options.ce_weight * ce.sum() + self.options.alm_weight * self.value(ce, statistics["row"])
            slope: Tensor
            (slope,) = torch.autograd.grad(loss, ce)
        return slope

    def differentiate(
        self,
        logits: Sequence[Tensor],
        chunk: Chunk,
        statistics: dict[str, Tensor],
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        assert weights is not None
        if needs[0]:
            columns = logits[0].t()
            columns.mul_(weights / statistics["total"])
            subtract_at(columns, self.targets[chunk.rows[0]], weights)
        return {"ce": weights * statistics["ce"]}


def binary_cross_entropy(
    teacher_likelihoods: PerChunk, student_likelihoods: PerChunk, temperature: float, epsilon: float
) -> PerChunk:
    """-[e^u v + (1 - e^u) log(1 - e^v)] with u, v the log-likelihoods over the temperature, less epsilon.

    Args:
        teacher_likelihoods: logs; those above 0 count as 0.
        student_likelihoods: likewise; carry gradient.
        temperature: tau_b.
        epsilon: keeps both off 0.
    """
    u = teacher_likelihoods.clamp(max=0) / temperature - epsilon
    v = student_likelihoods.clamp(max=0) / temperature - epsilon
    return -(u.exp() * v - torch.expm1(u) * log1mexp(v))


def log1mexp(x: PerChunk) -> PerChunk:
    """log(1 - e^x) for x < 0, exact near 0 and far from it."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
