"""DWA-KDv2: DWA-KD's entropy weights and banded Soft-DTW on top of DSKDv2 (arXiv 2602.21669, table 6)."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.kernels.soft_dtw import IMPLS
from dwakd.losses.alignment import sequence_terms
from dwakd.losses.attention import TeacherScale, band_penalty
from dwakd.losses.base import TEMPERATURES, DistillationLoss, Terms, check_at_least, check_choice, check_range
from dwakd.losses.divergences import divergence as named_divergence
from dwakd.losses.exact_spaces import ExactSpaces, exact_spaces, projected_partners
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.packing import example_ids, positions
from dwakd.losses.pair import ModelPair
from dwakd.losses.sides import require_width


class DwaKdV2Loss(DistillationLoss):
    """DSKDv2 with the uncertainty weights and the banded Soft-DTW terms of DWA-KD.

        L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t))

    The token-level terms are those of DSKDv2 (`exact_spaces`). KD^stu is weighted by H(p^s_i) max_v p^{t->s}_i(v) and KD^tea
    by 1 - H(p^t_j) / log V_t. The Soft-DTW terms are those of DWA-KD.

    The paper reports only a score and that its additions are applied to DSKDv2. We decided the rest as follows:

    - The agreement mask of DSKDv2 stays and multiplies the weights. The weights of the included tokens are rescaled together,
      so each term is a weighted mean where DSKDv2 has a plain mean. CE^{t->s} is not weighted.
    - There is no attention, so the band follows the exact alignment. Its centre is alpha j + (1 - alpha) i T / S for a token
      i aligned with j, and i T / S for the others. Its half-width is b everywhere. A pair is used here whatever the teacher
      predicts.
    - P is DSKDv2's t2s for hidden states, and a linear map with bias for embeddings, as in DWA-KD.

    Gradient: as in DSKDv2, and through nDTW to the student's hidden states and embeddings, t2s and embedding_t2s.

    Args:
        pair: vocabularies and heads of the two models.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the three terms of DSKDv2.
        dtw_weight: weight of the two Soft-DTW terms.
        temperature: divides the logits of both models in both divergences. There is no tau^2 factor.
        divergence: D, the divergence in both spaces.
        skew: lambda of the skewed divergences.
        agreement_mask: whether KD^stu includes only tokens where the projected teacher predicts the same token as the
            teacher itself.
        entropy_weights: whether the weights of KD^stu include the student's entropy H(p^s_i).
        gate: whether the weights of KD^stu include the projected teacher's largest probability. The only known code does
            not include it.
        teacher_weights: whether KD^tea is weighted.
        dtw_hidden: whether to align the final hidden states.
        dtw_embedding: whether to align the target embeddings.
        band: whether costs outside the band are penalised.
        band_base: b, half the width of the band, in tokens.
        band_blend: alpha, how far the centre of the band follows the alignment instead of the diagonal.
        band_penalty: lambda_band, added to each cost outside the band.
        gamma: temperature of the soft minimum.
        impl: kernel of Soft-DTW.

    Raises:
        ValueError: an option is out of range or unknown, or the vocabularies share no token.

    References:
        Vu et al. 2026, table 6 and equations 7 to 25; Zhang et al. 2025 (DSKDv2). The only known code
        (wind123mountain/mta-dtw) has no gate. For tokens without alignment it uses a row of ones as the alignment, which
        puts the centre of the band outside the sequence.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher", "dtw_hidden", "dtw_embedding")
    needs_pair: ClassVar[bool] = True

    def __init__(
        self,
        *,
        pair: ModelPair,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        dtw_weight: float = 0.2,
        temperature: float = 2.0,
        divergence: str = "forward_kl",
        skew: float = 0.1,
        agreement_mask: bool = True,
        entropy_weights: bool = True,
        gate: bool = True,
        teacher_weights: bool = True,
        dtw_hidden: bool = True,
        dtw_embedding: bool = True,
        band: bool = True,
        band_base: float = 5.0,
        band_blend: float = 0.7,
        band_penalty: float = 1.0,
        gamma: float = 2.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_at_least(0, ce_weight=ce_weight, kd_weight=kd_weight, dtw_weight=dtw_weight)
        check_at_least(0, band_base=band_base, band_penalty=band_penalty)
        check_at_least(1e-6, gamma=gamma)
        check_range(temperature=(temperature, *TEMPERATURES), band_blend=(band_blend, 0, 1))
        check_choice(impl=(impl, IMPLS))
        self.ce_weight, self.kd_weight, self.dtw_weight = ce_weight, kd_weight, dtw_weight
        self.temperature = temperature
        self.divergence = named_divergence(divergence, skew)
        self.weighting = {
            "agreement_mask": agreement_mask,
            "entropy_weights": entropy_weights,
            "gate": gate,
            "teacher_weights": teacher_weights,
        }
        self.dtw_hidden = dtw_hidden and dtw_weight > 0
        self.band = {"base": band_base, "blend": band_blend, "penalty": band_penalty} if band else None
        self.gamma, self.impl = gamma, impl
        self.projectors = HeadMaps(pair)
        self.embedding_t2s: nn.Linear | None = None
        if dtw_embedding and dtw_weight > 0:
            self.embedding_t2s = nn.Linear(pair.widths.teacher_embedding, pair.widths.student_embedding)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        spaces = exact_spaces(
            student,
            teacher,
            self.projectors,
            divergence=self.divergence,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            **self.weighting,
        )
        sequences = self._alignment(student, teacher, spaces)
        return Terms(
            spaces.terms | sequences,
            spaces.total,
            {"kd_teacher": self.kd_weight, **dict.fromkeys(sequences, self.dtw_weight)},
        )

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Tensor:
        return projected_partners(student, teacher, self.projectors)

    def _alignment(self, student: ModelSide, teacher: ModelSide, spaces: ExactSpaces) -> dict[str, Tensor]:
        """Compute the two Soft-DTW terms (DWA-KD, equations 17, 18 and 22 to 24) in one kernel call."""
        pairs = {}
        if self.dtw_hidden:
            pairs["dtw_hidden"] = (student.hidden, spaces.teacher_hidden)
        if self.embedding_t2s is not None:
            maps = self.embedding_t2s
            require_width(student.target_embeddings, maps.out_features, "student.target_embeddings", "embedding_t2s")
            require_width(teacher.target_embeddings, maps.in_features, "teacher.target_embeddings", "embedding_t2s")
            embeddings = teacher.target_embeddings.detach().to(self.embedding_t2s.weight.dtype)
            pairs["dtw_embedding"] = (student.target_embeddings, self.embedding_t2s(embeddings))
        band = None
        if self.band is not None and pairs:
            band = exact_band(spaces.partners, student.lengths, teacher.lengths, **self.band)
        return sequence_terms(pairs, student, teacher, gamma=self.gamma, band=band, impl=self.impl)


def exact_band(
    partners: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    *,
    base: float,
    blend: float,
    penalty: float,
) -> Float[Tensor, "batch s_length t_length"]:
    """Compute `band_penalty` around the exact alignment; a constant.

    Args:
        partners: the aligned teacher token of each student token in the packed batch, or -1. The band follows the diagonal at
            tokens without one.
        student_lengths: student tokens of each example.
        teacher_lengths: teacher tokens of each example.
        base: b, half the width of the band.
        blend: alpha, how far the centre follows the alignment.
        penalty: lambda_band, added to each cost outside the band.
    """
    examples, places = (part(student_lengths, len(partners)) for part in (example_ids, positions))
    starts = teacher_lengths.cumsum(0) - teacher_lengths
    columns = (partners - starts[examples]).clamp_min(0)
    shape = (len(student_lengths), int(student_lengths.max()), int(teacher_lengths.max()))
    aligned = torch.zeros(shape, device=partners.device)
    aligned[examples, places, columns] = (partners >= 0).to(aligned.dtype)
    follows = blend * aligned.sum(-1)
    return band_penalty(
        aligned, student_lengths, teacher_lengths, base=base, entropy_factor=0.0, blend=follows, penalty=penalty
    )
