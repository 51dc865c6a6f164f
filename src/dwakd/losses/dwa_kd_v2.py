"""DWA-KDv2: DWA-KD's entropy weights and banded Soft-DTW on top of DSKDv2 (arXiv 2602.21669, table 6)."""

from typing import Any, ClassVar, Literal

from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.losses.alignment import DTW_TERMS, DwaOptions, dtw_weights, sequence_terms
from dwakd.losses.band import Band
from dwakd.losses.base import DistillationLoss, Projection, Terms
from dwakd.losses.crossing import focus_on
from dwakd.losses.divergences import DivergenceName, divergence
from dwakd.losses.exact_spaces import ExactSpaces, exact_spaces, projected_partners
from dwakd.losses.head_maps import HeadMaps
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import pad_rows, require_width


class DwaKdV2Options(DwaOptions):
    needs_models = "pair"
    method: Literal["dwa_kd_v2"] = "dwa_kd_v2"
    divergence: DivergenceName = Field("forward_kl", description="Divergence D in both spaces.")
    agreement_mask: bool = Field(
        True,
        description="Whether KD^stu includes only tokens where the projected teacher predicts what the teacher does.",
    )


class DwaKdV2Loss(DistillationLoss[DwaKdV2Options]):
    """DSKDv2 with the uncertainty weights and the banded Soft-DTW terms of DWA-KD.

        L = ce_weight CE + kd_weight (CE^{t->s} + KD^stu + KD^tea) + dtw_weight (nDTW(h^s, P h^t) + nDTW(e^s, P e^t))

    The token-level terms are those of DSKDv2 (`exact_spaces`). KD^stu is weighted by H(p^s_i) max_v p^{t->s}_i(v) and KD^tea
    by 1 - H(p^t_j) / log V_t. The Soft-DTW terms are those of DWA-KD.

    The paper reports only a score and that its additions are applied to DSKDv2. We decided the rest as follows:

    - The agreement mask of DSKDv2 multiplies the weights, which are rescaled together over the included tokens. CE^{t->s} is
      not weighted.
    - There is no attention, so the band follows the exact alignment. Its centre is alpha j + (1 - alpha) i T / S for a token
      i aligned with j, and i T / S for the others. Its half-width is b everywhere.
    - P is DSKDv2's t2s for hidden states, and a linear map with bias for embeddings, as in DWA-KD.

    Gradient: as in DSKDv2, and through nDTW to the student's hidden states and embeddings, t2s and embedding_t2s.

    References:
        Vu et al. 2026, table 6 and equations 7 to 25; Zhang et al. 2025 (DSKDv2). The only known code
        (wind123mountain/mta-dtw) has no gate, and puts the centre of the band outside the sequence at unaligned tokens.
    """

    options_type = DwaKdV2Options
    terms: ClassVar[tuple[str, ...]] = ("ce", "t2s_ce", "kd_student", "kd_teacher", *DTW_TERMS)

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.divergence = divergence(self.options.divergence, self.options.skew)
        self.vocabularies, self.projectors = pair.vocabularies, HeadMaps(pair)
        self.embedding_t2s: nn.Linear | None = None
        if self.options.aligns_embedding:
            self.embedding_t2s = nn.Linear(pair.widths.teacher_embedding, pair.widths.student_embedding)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        options = self.options
        spaces = exact_spaces(
            student,
            teacher,
            self.projectors,
            divergence=self.divergence,
            temperature=options.temperature,
            ce_weight=ce_weight,
            kd_weight=options.kd_weight,
            agreement_mask=options.agreement_mask,
            entropy_weights=options.entropy_weights,
            gate=options.gate,
            teacher_weights=options.teacher_weights,
        )
        sequences, terms = self._alignment(student, teacher, spaces), spaces.terms
        weights = {**terms.weights, **dtw_weights(options, sequences)}
        return Terms({**terms.sums, **sequences}, terms.total, weights)

    def projected(self, student: ModelSide, teacher: ModelSide, teacher_scale: TeacherScale) -> Projection:
        return projected_partners(student, teacher, self.projectors)

    def _alignment(self, student: ModelSide, teacher: ModelSide, spaces: ExactSpaces) -> dict[str, Tensor]:
        """Compute the two Soft-DTW terms (DWA-KD, equations 17, 18 and 22 to 24)."""
        options = self.options
        hidden, embedding = spaces.teacher_hidden if options.aligns_hidden else None, None
        if self.embedding_t2s is not None:
            maps = self.embedding_t2s
            require_width(student.target_embeddings, maps.out_features, "student.target_embeddings", "embedding_t2s")
            require_width(teacher.target_embeddings, maps.in_features, "teacher.target_embeddings", "embedding_t2s")
            embedding = maps(teacher.target_embeddings.detach().to(maps.weight.dtype))
        band = None
        if options.band and options.dtw_weight > 0:
            band = exact_band(
                spaces.partners,
                student.lengths,
                teacher.lengths,
                base=options.band_base,
                blend=options.band_blend,
                penalty=options.band_penalty,
                length=max(student.counts),
            )
        return sequence_terms(options, (student, teacher), hidden, embedding, gamma=options.gamma, band=band)


def exact_band(
    partners: Int[Tensor, " s_tokens"],
    student_lengths: Int[Tensor, " batch"],
    teacher_lengths: Int[Tensor, " batch"],
    *,
    base: float,
    blend: float,
    penalty: float,
    length: int,
) -> Band:
    """Return the band around the exact alignment.

    `partners` is the aligned teacher token of each student token in the packed batch, or -1. At tokens without one, the band
    follows the diagonal. `length` is the largest number of student tokens.
    """
    lengths = student_lengths, teacher_lengths
    focus = focus_on(partners, *lengths, length)
    follows = blend * pad_rows((partners >= 0)[:, None], student_lengths, length)[..., 0]
    return Band.around(focus, *lengths, base=base, entropy_factor=0.0, blend=follows, penalty=penalty)
