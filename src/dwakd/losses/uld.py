"""ULD: compare sorted probabilities rank by rank, for any two vocabularies (arXiv 2402.12030)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, HeadRows, head_loss
from dwakd.kernels.head_loss.criterion import Logits, Statistics
from dwakd.kernels.sorted_distance import sorted_distance
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, MethodOptions, Temperature, Terms, Weight, head_rows
from dwakd.losses.merged_groups import sorted_difference
from dwakd.losses.packing import example_ids, positions

BLOCK = 2**21
"""Number of probabilities that are sorted at a time."""


class UldOptions(MethodOptions):
    """Options of `UldLoss`."""

    compat_defaults = {"dskd": {"ce_weight": 0.5, "uld_weight": 0.5}}  # noqa: RUF012

    method: Literal["uld"] = "uld"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy. The paper uses 1, compat dskd 0.5.")
    uld_weight: Weight = Field(1.5, description="Weight lambda of the distance. The paper uses 1.5, compat dskd 0.5.")
    temperature: Temperature = Field(
        1.0, description="Divides the logits of both models in the distance. The paper and all ports use 1."
    )
    compat: Literal["paper", "dskd"] = Field(
        "paper",
        description="'paper' takes the mean over the pairs of each example and weighs examples by their student tokens. "
        "'dskd' is the port that produced the tables of DSKD: a plain sum over the pairs.",
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
        Boizard et al. 2024, equation 6. The paper gives all examples of a batch equal weight, so its value depends on how
        examples are batched. With weights by student tokens, gradient accumulation and ranks do not change the loss. The
        value for a single example is that of the paper.
    """

    options_type = UldOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "uld")

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        options = self.options
        means = options.compat == "paper"
        rows, weights = paired_rows(student.lengths, teacher.lengths, len(student.target_ids), means)
        opposite = HeadRows(teacher.hidden.detach()[rows], teacher.head.detached(), student.lengths)
        criterion = SortedDifference(
            student.target_ids, weights, options.temperature, {"ce": options.ce_weight, "uld": options.uld_weight}
        )
        output = head_loss([head_rows(student), opposite], criterion)
        return Terms(output.terms, output.loss)


def paired_rows(
    student_lengths: Int[Tensor, " batch"], teacher_lengths: Int[Tensor, " batch"], num_tokens: int, mean: bool
) -> tuple[Int[Tensor, " s_tokens"], Float[Tensor, " s_tokens"]]:
    """Find the teacher's token at the same position of the response for each student token, and the pair's weight.

    Args:
        student_lengths: student tokens of each example.
        teacher_lengths: teacher tokens of each example.
        num_tokens: student tokens of the batch.
        mean: whether the pairs of an example have weight S_b / n_b, which gives a mean, instead of 1.

    Returns:
        Index of the teacher's token in the packed batch, and the weight. After the end of the teacher's response the weight
        is 0 and the index is that of its last token.
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
    """Compute the terms `ce` and `uld` = weight x sum_i |p_(i) - q_(i)| of the student's p and the teacher's q.

    Args:
        targets: the target token at each position.
        weights: a constant weight for each position.
        temperature: divides the logits of p and q.
        rates: weight of each term in the loss.
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
        """Compute terms and gradient by hand, a few positions at a time.

        No other tensor of the size of the vocabulary is kept for longer than its block.
        """
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
        """Compute both terms at each position, and overwrite `own` with the gradient."""
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
    """Compute softmax(logits / temperature) and the log of its normaliser.

    Equal logits give equal bits for student and teacher.
    """
    probs = logits.clone(memory_format=torch.contiguous_format)  # amax along the columns would take ten times as long
    peak = probs.amax(-1, keepdim=True)
    probs.sub_(peak)
    if temperature != 1.0:
        probs.div_(temperature)
    total = probs.exp_().sum(-1, keepdim=True)
    return probs.div_(total), (total.log() + peak / temperature).squeeze(-1)
