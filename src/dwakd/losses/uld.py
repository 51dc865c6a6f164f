"""Universal Logit Distillation: sorted probabilities compared rank by rank, whatever the vocabularies (2402.12030)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, HeadRows, head_loss
from dwakd.kernels.head_loss.criterion import Logits, Statistics
from dwakd.kernels.sorted_distance import sorted_distance
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import TEMPERATURES, DistillationLoss, Terms, check_range, head_rows
from dwakd.losses.merged_groups import sorted_difference
from dwakd.losses.packing import example_ids, positions

BLOCK = 2**21
"""Probabilities sorted at a time."""


class UldLoss(DistillationLoss):
    """L = ce_weight CE + uld_weight sum_b S_b / n_b sum_{k <= n_b} sum_i |p^s_{k,(i)} - p^t_{k,(i)}|.

    n_b = min(S_b, T_b); p_(i) is the i-th largest probability, 0 beyond the smaller vocabulary; position k of a
    response is compared with position k of the other tokenisation. It is the Wasserstein distance between two multisets
    of values, blind to what the tokens mean. Between 0 and 2 per token.

    Gradient: the student's hidden states and head, through both terms; piecewise linear in the probabilities.

    Args:
        ce_weight: 1 in the paper; 0.5 with compat dskd.
        uld_weight: lambda, 1.5 in the paper; 0.5 with compat dskd.
        temperature: softens both sides. The paper and every port use 1.
        compat: "paper": each example's mean over its n_b pairs, examples weighted by their student tokens; or "dskd",
            the port behind DSKD's tables: the plain sum over pairs.

    Raises:
        ValueError: an option out of range, or an unknown compat.

    References:
        Boizard et al. 2024, equation 6. The paper weighs all examples of a batch alike, which depends on who shares a
        batch; by student tokens, accumulation and ranks change nothing. One example alone gives the paper's value.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "uld")

    def __init__(
        self,
        *,
        ce_weight: float | None = None,
        uld_weight: float | None = None,
        temperature: float = 1.0,
        compat: str = "paper",
    ) -> None:
        super().__init__()
        if compat not in ("paper", "dskd"):
            raise ValueError(f"unknown compat {compat!r}; valid ones: paper, dskd")
        ce, uld = (1.0, 1.5) if compat == "paper" else (0.5, 0.5)
        self.ce_weight = ce if ce_weight is None else ce_weight
        self.uld_weight = uld if uld_weight is None else uld_weight
        check_range(
            ce_weight=(self.ce_weight, 0, float("inf")),
            uld_weight=(self.uld_weight, 0, float("inf")),
            temperature=(temperature, *TEMPERATURES),
        )
        self.temperature, self.mean_over_pairs = temperature, compat == "paper"

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        rows, weights = paired_rows(student.lengths, teacher.lengths, len(student.target_ids), self.mean_over_pairs)
        opposite = HeadRows(teacher.hidden.detach()[rows], teacher.head.detached(), student.lengths)
        criterion = SortedDifference(
            student.target_ids, weights, self.temperature, {"ce": self.ce_weight, "uld": self.uld_weight}
        )
        output = head_loss([head_rows(student), opposite], criterion)
        return Terms(output.terms, output.loss)


def paired_rows(
    student_lengths: Int[Tensor, " batch"], teacher_lengths: Int[Tensor, " batch"], num_tokens: int, mean: bool
) -> tuple[Int[Tensor, " s_tokens"], Float[Tensor, " s_tokens"]]:
    """The teacher's row at each student row's place in the response, and the pair's weight.

    The weight is S_b / n_b if `mean`, else 1; 0 past the end of the teacher's response, whose last row stands in there.
    """
    example = example_ids(student_lengths, num_tokens)
    place = positions(student_lengths, num_tokens)
    lengths = teacher_lengths[example]
    starts = (teacher_lengths.cumsum(0) - teacher_lengths)[example]
    rows = (starts + torch.minimum(place, lengths - 1)).clamp_min(0)
    pairs = torch.minimum(student_lengths, teacher_lengths).clamp_min(1)
    factor = (student_lengths / pairs)[example] if mean else torch.ones_like(lengths, dtype=torch.float32)
    return rows, torch.where(place < lengths, factor, 0.0)


class SortedDifference(Criterion):
    """Terms `ce`, and `uld` = weight x sum_i |p_(i) - q_(i)| of the student's p and the teacher's q.

    Args:
        targets: one token per row.
        weights: a constant per row.
        temperature: softens p and q.
        rates: each term's factor in the loss.
    """

    def __init__(
        self,
        targets: Int[Tensor, " tokens"],
        weights: Float[Tensor, " tokens"],
        temperature: float,
        rates: dict[str, float],
    ) -> None:
        super().__init__(rates)
        self.targets, self.pair_weights, self.temperature = targets, weights, temperature

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        ce = torch.nn.functional.nll_loss(logits[0].log_softmax(-1), self.targets[chunk.rows[0]], reduction="none")
        own, theirs = ((side / self.temperature).softmax(-1) for side in logits)
        distance = sorted_difference(theirs.detach(), own)
        return {"ce": ce, "uld": self.pair_weights[chunk.rows[0]].to(distance.dtype) * distance}

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        """By hand, a few rows at a time: nothing of the size of the vocabulary outlives its block."""
        size = max(BLOCK // max(side.shape[1] for side in logits) // 16, 1) * 16  # cache lines of the columns
        rows = chunk.rows[0]
        tensors = (*logits, self.targets[rows], self.pair_weights[rows])
        parts = zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
        with torch.no_grad():
            values = [self._block(*part, learns=needs[0]) for part in parts]
        return {name: torch.cat(value) for name, value in zip(("ce", "uld"), zip(*values, strict=True), strict=True)}

    def _block(
        self, own: Logits, theirs: Logits, targets: Tensor, weights: Tensor, *, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """Both terms by row; overwrites `own` with the gradient."""
        probs, log_total = _softmax(own, 1.0)
        ce = log_total - own.gather(-1, targets[:, None]).squeeze(-1)
        soft = probs if self.temperature == 1.0 else _softmax(own, self.temperature)[0]
        distance, slope = sorted_distance(soft, _softmax(theirs, self.temperature)[0])
        weights = weights.to(distance.dtype)
        if learns:
            slope.mul_(soft)  # in log p, and from there through the softmax
            slope.addcmul_(soft, slope.sum(-1, keepdim=True), value=-1)
            slope.mul_(((self.rates["uld"] / self.temperature) * weights)[:, None])
            slope.add_(probs, alpha=self.rates["ce"])
            slope.scatter_add_(-1, targets[:, None], torch.full_like(ce, -self.rates["ce"])[:, None])
            own.copy_(slope)
        return ce, weights * distance


def _softmax(logits: Logits, temperature: float) -> tuple[Logits, Tensor]:
    """softmax(logits / temperature) and the logarithm of its sum; the same bits for the same logits of either side."""
    probs = logits.clone(memory_format=torch.contiguous_format)  # amax along the columns would take ten times as long
    peak = probs.amax(-1, keepdim=True)
    probs.sub_(peak)
    if temperature != 1.0:
        probs.div_(temperature)
    total = probs.exp_().sum(-1, keepdim=True)
    return probs.div_(total), (total.log() + peak / temperature).squeeze(-1)
