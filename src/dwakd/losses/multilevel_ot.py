"""MultiLevelOT: compare each response's most probable tokens by rank and by optimal transport (arXiv 2412.14528)."""

from typing import ClassVar, Literal

from pydantic import Field

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import head_loss
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    Count,
    DistillationLoss,
    MethodOptions,
    Positive,
    Temperature,
    Terms,
    Weight,
    constant_rows,
    head_rows,
)
from dwakd.losses.ranked import Levels, PortLevels, RankedLevels


class MultiLevelOtOptions(MethodOptions):
    """Options of `MultiLevelOtLoss`."""

    compat_defaults = {  # noqa: RUF012
        "mcw_kd": {"ot_weight": 1.0, "sinkhorn_weight": 1e-4, "temperature": 2.0, "iterations": 10}
    }

    method: Literal["multilevel_ot"] = "multilevel_ot"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy.")
    ot_weight: Weight = Field(
        0.15,
        description="Weight alpha of the three other terms. The paper uses 0.15, compat mcw_kd 1.",
    )
    log_weight: Weight = Field(0.1, description="Relative weight beta of `logarithmic`.")
    sinkhorn_weight: Weight = Field(
        0.1,
        description="Relative weight gamma of `sinkhorn`. The paper uses 0.1, compat mcw_kd 0.0001.",
    )
    top_k: Count = Field(
        50, description="Number of tokens that replace the vocabulary; at most the size of the smaller vocabulary."
    )
    temperature: Temperature = Field(
        1.0,
        description="Divides the logits in `absolute`, in `logarithmic` and for the order of the tokens. The paper "
        "uses 1, compat mcw_kd 2.",
    )
    sequence_temperature: Temperature = Field(2.0, description="Divides the logits in `sinkhorn`.")
    regularisation: Positive = Field(0.1, description="Parameter lambda of the Sinkhorn iterations.")
    iterations: Count = Field(20, description="Number of Sinkhorn iterations. The paper uses 20, compat mcw_kd 10.")
    compat: Literal["paper", "mcw_kd"] = Field(
        "paper",
        description="'paper', or 'mcw_kd' for the port in the code of MCW-KD, the likely source of published tables. The port "
        "divides the logits by their standard deviation at each position, uses temperature 2, and applies a "
        "second softmax to the probabilities in `logarithmic` and `sinkhorn`. Its errors are not reproduced: it "
        "includes prompt and padding in every term, and it sorts the tokens once for the whole batch.",
    )


class MultiLevelOtLoss(DistillationLoss[MultiLevelOtOptions]):
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

    References:
        Cui et al. 2024, equations 6 to 14. Official code: 2018cx/Multi-Level-OT, which also differs from the paper.
    """

    options_type = MultiLevelOtOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "absolute", "logarithmic", "sinkhorn")

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        options = self.options
        levels = Levels(
            options.top_k,
            options.temperature,
            options.sequence_temperature,
            options.regularisation,
            options.iterations,
        )
        rates = {
            "ce": options.ce_weight,
            "absolute": options.ot_weight,
            "logarithmic": options.ot_weight * options.log_weight,
            "sinkhorn": options.ot_weight * options.sinkhorn_weight,
        }
        ranked = PortLevels if options.compat == "mcw_kd" else RankedLevels
        criterion = ranked(student.target_ids, (student.lengths, teacher.lengths), levels, rates)
        output = head_loss([head_rows(student), constant_rows(teacher)], criterion)
        return Terms(output.terms, output.loss)
