"""GOLD: merge the tokens of equal text, compare shared tokens by JSD and all others by rank (TRL)."""

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
    check_at_least,
    check_choice,
    check_range,
    constant_rows,
    head_rows,
)
from dwakd.losses.merged_groups import Anchors, Columns, MergedGroups
from dwakd.losses.pair import ModelPair

MERGES = ("bayesian", "observed")


class GoldLoss(DistillationLoss):
    """Merge the tokens that cover the same text on both sides, and compare the merged distributions.

        L = ce_weight CE + kd_weight sum_g (w_m JSD(t_g, s_g) + w_u |sort t_g - sort s_g|_1)

    A group g is the smallest pair of token spans that start and end at the same bytes. The merged distribution of a model is
    the distribution of one token of the group times the probabilities of the other tokens in the text; it does not sum to 1.
    The Jensen-Shannon divergence JSD is over the tokens with equal bytes in both vocabularies, the difference of the sorted
    probabilities over all others. Each group of an example has the same weight, and the weights of an example sum to its
    number of student tokens.

    Gradient: the student's hidden states and head, through the distribution and the probabilities of the other tokens.

    Args:
        pair: vocabularies and heads of the two models.
        beta: weight of the teacher in the mixture m of JSD = beta KL(t || m) + (1 - beta) KL(s || m). At 0 the divergence is
            KL(t || s), at 1 it is KL(s || t).
        merge: "bayesian" takes the distribution of a group's last token and the probabilities of the tokens before it.
            "observed", TRL's default, takes the distribution of the first token and the probabilities of those after it.
        matched_weight: w_m. Default: the fraction of the teacher's vocabulary that is matched. Tokens that the head forbids
            are not included.
        unmatched_weight: w_u. Default: 1 - w_m. Set both weights or none.
        temperature: divides the logits of both models before merging. TRL uses 1, the only value at which the product of
            probabilities is the probability of the group.
        ce_weight: weight of the cross-entropy. TRL uses 0.
        kd_weight: weight of the two other terms.

    Raises:
        ValueError: an option is out of range or unknown, or only one of w_m and w_u is set.

    References:
        TRL, experimental GOLD (hybrid ULD loss), for the answers of a data set. Unlike TRL, tokens match by their bytes in
        any tokenizer, and the end tokens match. "observed" takes the position that predicts the first token of the group,
        where TRL takes the next one. Probabilities are not clamped. If one side has no unmatched token, `uld` is the sum of
        the other side's unmatched probabilities.
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
        check_range(beta=(beta, 0, 1), temperature=(temperature, *TEMPERATURES))
        check_at_least(0, ce_weight=ce_weight, kd_weight=kd_weight)
        check_at_least(0, matched_weight=0 if matched_weight is None else matched_weight)
        check_at_least(0, unmatched_weight=0 if unmatched_weight is None else unmatched_weight)
        check_choice(merge=(merge, MERGES))
        if (matched_weight is None) != (unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight must be set together or not at all")
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
