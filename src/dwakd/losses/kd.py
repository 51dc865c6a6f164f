"""KD: knowledge distillation between models with the same tokenizer, by a divergence at each token."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, forward_kl, head_loss
from dwakd.kernels.head_loss.criterion import Logits, Statistics
from dwakd.kernels.head_loss.statistics import SoftenedPair, pick, subtract_at
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import DistillationLoss, MethodOptions, Rate, Temperature, Terms, constant_rows, head_rows
from dwakd.losses.divergences import DivergenceName
from dwakd.losses.divergences import divergence as divergence_named


class KdOptions(MethodOptions):
    """Options of `KdLoss`."""

    method: Literal["kd"] = "kd"
    kd_rate: Rate = Field(0.5, description="Weight r of the divergence.")
    temperature: Temperature = Field(
        2.0, description="Divides the logits of both models in D. There is no tau^2 factor."
    )
    divergence: DivergenceName = Field("forward_kl", description="Divergence D.")
    skew: Rate = Field(0.1, description="Parameter lambda of the skewed divergences.")

    @property
    def needs_same_vocabulary(self) -> bool:
        return True


class KdLoss(DistillationLoss[KdOptions]):
    """Train the student to predict the teacher's distribution at each token, for models with the same tokenizer.

        L = (1 - r) CE + r sum_i D(p^t_i || p^s_i)

    The divergence D is over the vocabulary entries that both heads have, because one head may be padded with more unused
    entries than the other. The cross-entropy CE is over all entries of the student's head.

    Gradient: the student's hidden states and head, through both terms.

    References:
        Hinton et al. 2015. Divergences: Gu et al. 2024, Ko et al. 2024 (DistiLLM) and Wu et al. 2024 (adaptive KL).
        The defaults are those of songmzhang/DSKD. DistiLLM itself uses temperature 1.
    """

    options_type = KdOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.divergence = divergence_named(self.options.divergence, self.options.skew)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        by_hand = self.divergence is forward_kl and student.head.vocab_size <= teacher.head.vocab_size
        output = head_loss(
            [head_rows(student), constant_rows(teacher)],
            (ForwardKlPair if by_hand else SameVocabulary)(
                student.target_ids,
                self.options.temperature,
                {"ce": 1 - self.options.kd_rate, "kd": self.options.kd_rate},
                self.divergence,
            ),
        )
        return Terms(output.terms, output.loss)


class SameVocabulary(Criterion):
    """Compute the terms `ce` and `kd` = D(p^t || p^s) of each token from both models' logits.

    Args:
        targets: the target token at each position.
        temperature: divides the logits of both models in D.
        rates: weight of each term in the loss.
        divergence: D, a function of two tensors of log-probabilities (target, learned), with one value per token.
    """

    def __init__(
        self,
        targets: Int[Tensor, " tokens"],
        temperature: float,
        rates: dict[str, float],
        divergence: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(rates)
        self.targets, self.temperature, self.divergence = targets, temperature, divergence

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        own, theirs = logits
        common = min(own.shape[1], theirs.shape[1])
        softened = [(side[:, :common] / self.temperature).log_softmax(-1) for side in (theirs.detach(), own)]
        targets = self.targets[chunk.rows[0]]
        return {
            "ce": torch.nn.functional.nll_loss(own.log_softmax(-1), targets, reduction="none"),
            "kd": self.divergence(*softened),
        }


class ForwardKlPair(SameVocabulary):
    """`SameVocabulary` for the forward KL, with a hand-written gradient.

    The student's head must not be wider than the teacher's.
    """

    def observe(self, logits: Sequence[Logits], chunk: Chunk) -> Statistics:
        own = logits[0].t()
        theirs = logits[1].t()[: own.shape[0]]
        chosen = pick(own, self.targets[chunk.rows[0]])
        mine, other, kl = SoftenedPair(self.temperature).observe(own, theirs, entropy_of=None, totals_of=(own,))
        return {
            "ce": mine.total.log() + mine.peak - chosen,
            "kd": kl,
            "own_total": mine.total,
            "own_soft_total": mine.soft_total,
            "their_soft_total": other.soft_total,
        }

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        if needs[0]:
            own = logits[0].t()
            theirs = logits[1].t()[: own.shape[0]]
            pair, rate = SoftenedPair(self.temperature), self.rates["kd"] / self.temperature
            share, their_share = (rate / statistics[f"{name}_soft_total"] for name in ("own", "their"))
            ce_share = self.rates["ce"] / statistics["own_total"]
            pair.differentiate(own, theirs, (share, their_share, ce_share, torch.zeros_like(ce_share)))
            subtract_at(own, self.targets[chunk.rows[0]], torch.full_like(ce_share, self.rates["ce"]))
        return {name: statistics[name] for name in ("ce", "kd")}
