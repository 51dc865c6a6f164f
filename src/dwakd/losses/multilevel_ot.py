"""MultiLevelOT: the most probable tokens of a sequence, compared token by token and as a whole (arXiv 2412.14528)."""

from typing import ClassVar

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
from dwakd.losses.ranked import Levels, PortLevels, RankedLevels

INFINITY = float("inf")


class MultiLevelOtLoss(DistillationLoss):
    """L = CE + ot_weight (absolute + log_weight x logarithmic + sinkhorn_weight x sinkhorn).

    Of each sequence, the top_k tokens of largest probability summed over its positions stand for the vocabulary, in
    that order; the i-th of the teacher is compared with the i-th of the student at every position. With t and s their
    probabilities and n = min(S, T): absolute = sum_{k <= n} sum_i |t_ki - s_ki|, logarithmic = - sum_{k <= n} sum_i
    t_ki log s_ki, and sinkhorn = n x the transport cost between all the teacher's positions and all the student's, with
    costs sum_i |t_ki - s_li|. For S = T these are the paper's, which leaves S != T open.

    Gradient: the student's hidden states and head, through all terms; orders are constants.

    Args:
        ce_weight: of the cross-entropy.
        ot_weight: alpha, 0.15 in the paper; 1 with compat mcw_kd.
        log_weight: beta.
        sinkhorn_weight: gamma, 0.1 in the paper; 0.0001 with compat mcw_kd.
        top_k: tokens per sequence; fewer where a vocabulary has fewer.
        temperature: of absolute and logarithmic, and of the order, 1 in the paper.
        sequence_temperature: of the costs of sinkhorn.
        regularisation: lambda of Sinkhorn's iterations.
        iterations: pairs of scalings, 20 in the paper; 10 with compat mcw_kd.
        compat: "paper", or "mcw_kd" for the port in MCW-KD's code, the likely source of published tables: logits
            divided by their standard deviation per token, temperature 2, and probabilities that pass through a softmax
            once more in logarithmic and sinkhorn. Left out: prompt and padding in every term, and one order for the
            whole batch.

    Raises:
        ValueError: an option out of range, or an unknown compat.

    References:
        Cui et al. 2024, equations 6 to 14. Official code: 2018cx/Multi-Level-OT, which differs from its paper too.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "absolute", "logarithmic", "sinkhorn")

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        ot_weight: float | None = None,
        log_weight: float = 0.1,
        sinkhorn_weight: float | None = None,
        top_k: int = 50,
        temperature: float | None = None,
        sequence_temperature: float = 2.0,
        regularisation: float = 0.1,
        iterations: int | None = None,
        compat: str = "paper",
    ) -> None:
        super().__init__()
        if compat not in ("paper", "mcw_kd"):
            raise ValueError(f"unknown compat {compat!r}; valid ones: paper, mcw_kd")
        port = compat == "mcw_kd"
        ot_weight = (1.0 if port else 0.15) if ot_weight is None else ot_weight
        sinkhorn_weight = (1e-4 if port else 0.1) if sinkhorn_weight is None else sinkhorn_weight
        temperature = (2.0 if port else 1.0) if temperature is None else temperature
        iterations = (10 if port else 20) if iterations is None else iterations
        check_range(
            ce_weight=(ce_weight, 0, INFINITY),
            ot_weight=(ot_weight, 0, INFINITY),
            log_weight=(log_weight, 0, INFINITY),
            sinkhorn_weight=(sinkhorn_weight, 0, INFINITY),
            top_k=(top_k, 1, INFINITY),
            temperature=(temperature, *TEMPERATURES),
            sequence_temperature=(sequence_temperature, *TEMPERATURES),
            regularisation=(regularisation, 1e-6, INFINITY),
            iterations=(iterations, 1, INFINITY),
        )
        self.ot_weight = ot_weight
        self.rates = {
            "ce": ce_weight,
            "absolute": ot_weight,
            "logarithmic": ot_weight * log_weight,
            "sinkhorn": ot_weight * sinkhorn_weight,
        }
        self.levels = Levels(top_k, temperature, sequence_temperature, regularisation, iterations)
        self.criterion = PortLevels if port else RankedLevels

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        criterion = self.criterion(student.target_ids, (student.lengths, teacher.lengths), self.levels, self.rates)
        output = head_loss([head_rows(student), constant_rows(teacher)], criterion)
        return Terms(output.terms, output.loss)
