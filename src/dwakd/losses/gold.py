"""GOLD: byte groups merged to one distribution each, compared on shared tokens by JSD and elsewhere by rank (TRL)."""

from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dwakd.align.offsets import byte_groups, tokens_per_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    TEMPERATURES,
    DistillationLoss,
    Terms,
    check_range,
    constant_rows,
    head_rows,
)
from dwakd.losses.merged_groups import Anchors, Columns, MergedGroups
from dwakd.losses.pair import ModelPair

MERGES = ("bayesian", "observed")


class GoldLoss(DistillationLoss):
    """L = ce_weight CE + kd_weight sum_g (w_m JSD(t_g, s_g) + w_u |sort t_g - sort s_g|_1).

    A group g is the smallest pair of spans that end at the same byte. Its distribution, of either model, is that of one
    of its tokens times the probabilities of the others as realised, which does not sum to 1. JSD is over the tokens
    that both vocabularies spell alike, the sorted difference over all others. The groups of an example weigh alike, and
    together as many tokens as it has.

    Gradient: the student's rows and head, through its distribution and the realised probabilities.

    Args:
        pair: vocabularies and heads.
        beta: the teacher's share of the mixture m: beta KL(t || m) + (1 - beta) KL(s || m); at 0 it is
            KL(t || s), at 1 KL(s || t).
        merge: "bayesian" takes the distribution of a group's last token and the probabilities of those before it;
            "observed" that of the first and those after it, TRL's default.
        matched_weight: w_m; by default the share of the teacher's head that is matched, without the tokens that the
            head forbids.
        unmatched_weight: w_u; by default the rest. Both weights are given, or none.
        temperature: divides the logits of both sides, before merging; 1 in TRL, where alone the chain rule holds.
        ce_weight: 0 in TRL.
        kd_weight: of the rest.

    Raises:
        ValueError: an option out of range or unknown, or only one of the two weights.

    References:
        TRL, experimental GOLD (hybrid ULD loss), on a data set's answers. Here tokens match by their bytes, whatever
        the kind of tokenizer, end tokens included; "observed" takes the row that predicts the first token, not the next
        one; nothing is clamped.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "jsd", "uld")
    needs_pair: ClassVar[bool] = True
    student_ids: Int[Tensor, " overlap"]
    teacher_ids: Int[Tensor, " overlap"]
    student_rest: Int[Tensor, " s_rest"]
    teacher_rest: Int[Tensor, " t_rest"]

    def __init__(
        self,
        *,
        pair: ModelPair,
        beta: float = 0.5,
        merge: str = "bayesian",
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
    ) -> None:
        super().__init__()
        infinite = float("inf")
        check_range(
            beta=(beta, 0, 1),
            temperature=(temperature, *TEMPERATURES),
            ce_weight=(ce_weight, 0, infinite),
            kd_weight=(kd_weight, 0, infinite),
            matched_weight=(0 if matched_weight is None else matched_weight, 0, infinite),
            unmatched_weight=(0 if unmatched_weight is None else unmatched_weight, 0, infinite),
        )
        if merge not in MERGES:
            raise ValueError(f"unknown merge {merge!r}; valid ones: {', '.join(MERGES)}")
        if (matched_weight is None) != (unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight are given together or not at all")
        self.beta, self.merge, self.temperature = beta, merge, temperature
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.vocabularies = pair.vocabularies
        self._match(pair)
        share = len(self.teacher_ids) / int(pair.teacher_head.num_possible)
        self.matched_weight = share if matched_weight is None else matched_weight
        self.unmatched_weight = 1 - share if unmatched_weight is None else unmatched_weight

    def _match(self, pair: ModelPair) -> None:
        sizes = pair.vocabularies
        if pair.student_tokens == pair.teacher_tokens:  # the padding of both heads too
            matched = pair.possible_pairs(torch.arange(min(sizes)), torch.arange(min(sizes)))
        else:
            matched = pair.shared_tokens()
        for name, ids, size in zip(("student", "teacher"), matched, sizes, strict=True):
            rest = torch.ones(size, dtype=torch.bool).index_fill(0, ids, False)
            self.register_buffer(f"{name}_ids", ids, persistent=False)
            self.register_buffer(f"{name}_rest", rest.nonzero().squeeze(1), persistent=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        criterion = MergedGroups(
            Anchors.of(student, groups.student, groups.student_last, last=self.merge == "bayesian"),
            Anchors.of(teacher, groups.teacher, groups.teacher_last, last=self.merge == "bayesian"),
            Columns(self.student_ids, self.student_rest),
            Columns(self.teacher_ids, self.teacher_rest),
            tokens_per_group(groups, student.lengths, even=True),
            {
                "ce": self.ce_weight,
                "jsd": self.kd_weight * self.matched_weight,
                "uld": self.kd_weight * self.unmatched_weight,
            },
            beta=self.beta,
            temperature=self.temperature,
        )
        output = head_loss([head_rows(student), constant_rows(teacher)], criterion)
        return Terms(output.terms, output.loss)
