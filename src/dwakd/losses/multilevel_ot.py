"""MultiLevelOT: compare each response's most probable tokens by rank and by optimal transport (arXiv 2412.14528)."""

from typing import ClassVar

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    LARGEST,
    TEMPERATURES,
    DistillationLoss,
    Terms,
    check_at_least,
    check_choice,
    check_range,
    constant_rows,
    head_rows,
)
from dwakd.losses.ranked import Levels, PortLevels, RankedLevels


class MultiLevelOtLoss(DistillationLoss):
    """Compare the most probable tokens of a response by rank at each position, and by transport between positions.

        L = ce_weight CE + ot_weight (absolute + log_weight x logarithmic + sinkhorn_weight x sinkhorn)

    For each model, the top_k tokens with the largest probability summed over the response replace the vocabulary. They are
    sorted by that sum, and the i-th token of the teacher is compared with the i-th token of the student. With their
    probabilities t and s at each position, and n = min(S, T) of S student and T teacher positions:

        absolute    = sum_{k <= n} sum_i |t_ki - s_ki|
        logarithmic = - sum_{k <= n} sum_i t_ki log s_ki
        sinkhorn    = n x transport cost between all positions of both, where moving l to k costs sum_i |t_ki - s_li|

    For S = T these are the terms of the paper, which does not define S != T.

    Gradient: the student's hidden states and head, through all terms. The order of the tokens is a constant.

    Args:
        ce_weight: weight of the cross-entropy.
        ot_weight: alpha, the weight of the three other terms. Default: 0.15 as in the paper, or 1 with compat mcw_kd.
        log_weight: beta, the relative weight of `logarithmic`.
        sinkhorn_weight: gamma, the relative weight of `sinkhorn`. Default: 0.1 as in the paper, or 0.0001 with compat
            mcw_kd.
        top_k: number of tokens that replace the vocabulary; at most the size of the smaller vocabulary.
        temperature: divides the logits in `absolute`, in `logarithmic` and for the order of the tokens. Default: 1 as in the
            paper, or 2 with compat mcw_kd.
        sequence_temperature: divides the logits in `sinkhorn`.
        regularisation: lambda of the Sinkhorn iterations.
        iterations: number of Sinkhorn iterations. Default: 20 as in the paper, or 10 with compat mcw_kd.
        compat: "paper", or "mcw_kd" for the port in the code of MCW-KD, the likely source of published tables. The port
            divides the logits by their standard deviation at each position, uses temperature 2, and applies a second softmax
            to the probabilities in `logarithmic` and `sinkhorn`. Its errors are not reproduced: it includes prompt and
            padding in every term, and it sorts the tokens once for the whole batch.

    Raises:
        ValueError: an option is out of range or compat is unknown.

    References:
        Cui et al. 2024, equations 6 to 14. Official code: 2018cx/Multi-Level-OT, which also differs from the paper.
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
        check_choice(compat=(compat, ("paper", "mcw_kd")))
        port = compat == "mcw_kd"
        ot_weight = (1.0 if port else 0.15) if ot_weight is None else ot_weight
        sinkhorn_weight = (1e-4 if port else 0.1) if sinkhorn_weight is None else sinkhorn_weight
        temperature = (2.0 if port else 1.0) if temperature is None else temperature
        iterations = (10 if port else 20) if iterations is None else iterations
        check_at_least(
            0, ce_weight=ce_weight, ot_weight=ot_weight, log_weight=log_weight, sinkhorn_weight=sinkhorn_weight
        )
        check_at_least(1, top_k=top_k, iterations=iterations)
        check_range(
            temperature=(temperature, *TEMPERATURES),
            sequence_temperature=(sequence_temperature, *TEMPERATURES),
            regularisation=(regularisation, 1e-6, LARGEST),
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
