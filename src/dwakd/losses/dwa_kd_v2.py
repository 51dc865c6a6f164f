"""DWA-KDv2: DWA-KD's entropy weights and banded Soft-DTW on top of DSKDv2 (arXiv 2602.21669, table 6)."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.kernels.soft_dtw import IMPLS
from dwakd.losses.alignment import sequence_terms
from dwakd.losses.attention import TeacherScale, band_penalty
from dwakd.losses.base import TEMPERATURES, DistillationLoss, Terms, check_range
from dwakd.losses.divergences import divergence as named_divergence
from dwakd.losses.exact_spaces import ExactSpaces, exact_spaces, projected_partners
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.packing import example_ids, positions
from dwakd.losses.pair import ModelPair
from dwakd.losses.sides import require_width

INFINITY = float("inf")


class DwaKdV2Loss(DistillationLoss):
    """L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t)).

    The token-level terms are those of DSKDv2 (`exact_spaces`) with the rows of KD^stu weighted by
    H(p^s_i) max_v p^{t->s}_i(v) and those of KD^tea by 1 - H(p^t_j) / log V_t; the sequence-level terms are DWA-KD's.

    The paper reports a score and says no more than that its additions sit on DSKDv2. What it leaves open is decided so:

    - An addition takes nothing away: DSKDv2's agreement mask stays, and multiplies the weights. Rows that count are
      rescaled together, which makes each term a weighted mean in the place of DSKDv2's plain one. CE^{t->s} stays
      unweighted.
    - Attention is gone; the band follows the exact alignment. The centre of an aligned row is
      alpha j + (1 - alpha) i T / S, that of another i T / S. No row has entropy, so every width is b. A pair counts
      here whatever the teacher predicts at it.
    - P of the hidden states is DSKDv2's t2s; that of the embeddings a linear map with bias, as in DWA-KD.

    Gradient: as in DSKDv2, and through nDTW to the student's hidden states and embeddings, t2s and embedding_t2s.

    Args:
        pair: of the two models.
        ce_weight: lambda_CE.
        kd_weight: lambda_W-KD.
        dtw_weight: lambda_DTW.
        temperature: softens both sides of both divergences; no tau^2 factor.
        divergence: D in both spaces.
        skew: lambda of the skewed divergences.
        agreement_mask: as in DSKDv2.
        entropy_weights: the factor H(p^s_i).
        gate: the factor max_v p^{t->s}_i(v); the code that circulates goes without.
        teacher_weights: weights of the teacher space.
        dtw_hidden: the pair of final hidden states.
        dtw_embedding: the pair of target embeddings.
        band: whether the cross cost is banded.
        band_base: b, in tokens.
        band_blend: alpha.
        band_penalty: lambda_band.
        gamma: temperature of the soft minimum.
        impl: kernel of Soft-DTW.

    Raises:
        ValueError: an option out of range or unknown, or vocabularies that share no token.

    References:
        Vu et al. 2026, table 6 and equations 7 to 25; Zhang et al. 2025 (DSKDv2). The only code known
        (wind123mountain/mta-dtw) weighs without the gate, and gives rows without a partner a uniform row of ones for an
        alignment, which puts their centre outside the sequence.
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
        check_range(
            ce_weight=(ce_weight, 0, INFINITY),
            kd_weight=(kd_weight, 0, INFINITY),
            dtw_weight=(dtw_weight, 0, INFINITY),
            temperature=(temperature, *TEMPERATURES),
            band_base=(band_base, 0, INFINITY),
            band_blend=(band_blend, 0, 1),
            band_penalty=(band_penalty, 0, INFINITY),
            gamma=(gamma, 1e-6, INFINITY),
        )
        if impl not in IMPLS:
            raise ValueError(f"unknown impl {impl!r}; valid ones: {', '.join(IMPLS)}")
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
        """DWA-KD's equations 17, 18 and 22 to 24: both pairs of sequences in one Soft-DTW call."""
        pairs = {}
        if self.dtw_hidden:
            pairs["dtw_hidden"] = (student.hidden, spaces.teacher_hidden)
        if self.embedding_t2s is not None:
            maps = self.embedding_t2s
            require_width(student.target_embeddings, maps.out_features, "student.target_embeddings", "embedding_t2s")
            require_width(teacher.target_embeddings, maps.in_features, "teacher.target_embeddings", "embedding_t2s")
            embeddings = teacher.target_embeddings.detach().to(self.embedding_t2s.weight.dtype)
            pairs["dtw_embedding"] = (student.target_embeddings, self.embedding_t2s(embeddings))
        if not pairs:
            return {}
        band = None
        if self.band is not None:
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
    """`band_penalty` around the exact alignment; rows without a partner follow the diagonal alone. A constant."""
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
