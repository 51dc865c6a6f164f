"""MinED: map the teacher's distribution to the student's tokens of least edit distance (arXiv 2401.10491)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from dwakd.align.vocab import nearest_tokens
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, HeadRows, head_loss
from dwakd.losses.base import DistillationLoss, Terms, head_rows
from dwakd.losses.columns import cross_entropy, log_total
from dwakd.losses.options import MethodOptions, Rate, Softening
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids

DROPPED = -1


class MinEdOptions(MethodOptions):
    needs_models = "pair"
    needs_edit_alignment = True
    method: Literal["min_ed"] = "min_ed"
    kd_rate: Rate = Field(0.5, description="Weight r of the second term. The published port uses 0.5.")
    temperature: Softening = 2.0
    vocabulary_map: Literal["sum", "first"] = Field(
        "sum",
        description="If several teacher tokens map to one student token, sum adds their probabilities; first keeps only the "
        "one with the lowest id, as the port does.",
    )
    same_prefix: bool = Field(
        False,
        description="Whether both models must have read the same bytes at an aligned position.",
    )

    @property
    def supports_sampled(self) -> bool:
        return False  # tokens that are not aligned learn the response itself


class MinEdLoss(DistillationLoss[MinEdOptions]):
    """Align tokens by edit distance and train the student on the teacher's distribution, mapped to its vocabulary.

        L = (1 - r) CE + r sum_i KL(m_i || p^s_i),    both at temperature tau

    r is the option `kd_rate`. m_i is the teacher's distribution at the position aligned with i. The probability of each
    teacher token goes to the student's token of least edit distance. At positions without alignment, m_i is 1 at the
    target, so that the second term is a second cross-entropy. Positions are aligned once for a data set, by dynamic
    time warping over the spelling of the tokens that the models read. Position i is aligned if the warping path pairs
    it with exactly one teacher position and the teacher's token there maps to the student's token.

    Gradient: the student's hidden states and head.

    Args:
        pair: vocabularies and heads of the two models. Teacher tokens without a counterpart (special tokens, padding of the
            head, tokens that a head forbids) are left out of m.

    References:
        Wan et al. 2024 (FuseLLM). Only the alignment is used here, without the fusion of several teachers, the stored top-10
        logits and the weight 0.9 of the cross-entropy. Port: songmzhang/DSKD, whose targets overwrite the student's logits
        in float32; ours do not.
    """

    options_type = MinEdOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")
    student_of: Int[Tensor, " t_vocab"]

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        ends = None if pair.end_tokens is None else pair.end_tokens[::-1]
        student_tokens, teacher_tokens = pair.possible_tokens()
        found = nearest_tokens(teacher_tokens, student_tokens, ends)
        student_of = torch.full((pair.teacher_head.vocab_size,), DROPPED)
        student_of[: len(found)] = found
        if self.options.vocabulary_map == "first":
            student_of = firsts_only(student_of)
        self.register_buffer("student_of", student_of, persistent=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        rows, aligned = aligned_teacher_rows(student, teacher, same_prefix=self.options.same_prefix)
        carried = HeadRows(teacher.hidden.detach()[rows], teacher.head.detached(), student.lengths)
        return Terms.of(
            head_loss([head_rows(student), carried], CarriedOver(self, student.target_ids, aligned, ce_weight))
        )


class CarriedOver(Criterion):
    """Compute the terms `ce` and `kd` = KL(m || p^s) from the logits of each student position and its aligned position."""

    def __init__(
        self, loss: MinEdLoss, targets: Int[Tensor, " tokens"], aligned: Bool[Tensor, " tokens"], ce_weight: float
    ) -> None:
        student_of = loss.student_of
        super().__init__({"ce": ce_weight, "kd": loss.options.kd_rate})
        self.targets, self.aligned, self.temperature = targets, aligned, loss.options.temperature
        self.dropped = (student_of == DROPPED).nonzero().squeeze(1)
        self.student_of = student_of.clamp(min=0)

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        own, theirs = logits[0].t(), logits[1].detach().t()
        targets, aligned = self.targets[chunk.rows[0]], self.aligned[chunk.rows[0]]
        # this overwrites the teacher's logits, which are not needed afterwards
        kept = theirs.index_fill_(0, self.dropped, -torch.inf)
        kept.sub_(kept.amax(0)).div_(self.temperature).exp_()
        mapped = torch.zeros_like(own).index_add_(0, self.student_of, kept)
        total = mapped.sum(0)
        entropy = torch.special.entr(mapped).sum(0) / total + total.log()
        # the student's head may forbid tokens by a logit of -inf, but no teacher token is mapped to them
        cross = (mapped * own.clamp_min(torch.finfo(own.dtype).min)).sum(0) / total
        chosen = torch.where(aligned, cross, own.gather(0, targets[None]).squeeze(0))
        kd = log_total(own, self.temperature) - chosen / self.temperature - entropy.where(aligned, 0.0)
        return {"ce": cross_entropy(own, targets), "kd": kd}


def aligned_teacher_rows(
    student: ModelSide, teacher: ModelSide, *, same_prefix: bool
) -> tuple[Int[Tensor, " s_tokens"], Bool[Tensor, " s_tokens"]]:
    """Find the aligned teacher position in the packed batch for each student position, and whether there is one."""
    if teacher.aligned_rows is None:
        raise ValueError(
            "min_ed needs aligned_rows on the teacher's side; compute them with data.pairs.align_by_spelling"
        )
    within, count = teacher.aligned_rows, len(student.target_ids)
    if len(within) != count:
        raise ValueError(
            f"teacher.aligned_rows must have one entry for each of the {count} student tokens, got {len(within)}"
        )
    firsts = (teacher.lengths.cumsum(0) - teacher.lengths)[example_ids(student.lengths, count)]
    rows, aligned = firsts + within.clamp_min(0), within >= 0
    if same_prefix:
        read = [side.byte_starts for side in (student, teacher)]
        aligned = aligned & (read[0] == read[1][rows])
    return rows, aligned


def firsts_only(student_of: Int[Tensor, " t_vocab"]) -> Int[Tensor, " t_vocab"]:
    """Drop the teacher tokens that map to the same student token as a teacher token with a lower id."""
    size = int(student_of.max()) + 1
    ids = torch.arange(len(student_of))
    mapped = student_of != DROPPED
    first = torch.full((size,), len(student_of)).scatter_reduce(0, student_of[mapped], ids[mapped], "amin")
    return student_of.where(mapped & (first[student_of.clamp(min=0)] == ids), DROPPED)
