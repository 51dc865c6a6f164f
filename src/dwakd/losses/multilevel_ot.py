"""MultiLevelOT: compare each response's most probable tokens by rank and by optimal transport (arXiv 2412.14528)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, head_loss
from dwakd.kernels.head_loss.statistics import blocks, is_possible
from dwakd.kernels.sinkhorn import sinkhorn
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import Columns, cross_entropy, log_probs_at, log_total
from dwakd.losses.options import Count, MethodOptions, Positive, Temperature, Weight
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import example_ids, pad_rows

Top = Float[Tensor, "_ top"]


class MultiLevelOtOptions(MethodOptions):
    variant_defaults = {  # noqa: RUF012
        "mcw_kd": {"ot_weight": 1.0, "sinkhorn_weight": 1e-4, "temperature": 2.0, "iterations": 10}
    }
    method: Literal["multilevel_ot"] = "multilevel_ot"
    ce_weight: Weight = Field(1.0, description="Weight of the cross-entropy.")
    ot_weight: Weight = Field(
        0.15, description="Weight alpha of the three other terms. The paper uses 0.15, variant mcw_kd 1."
    )
    log_weight: Weight = Field(0.1, description="Relative weight beta of `logarithmic`.")
    sinkhorn_weight: Weight = Field(
        0.1, description="Relative weight gamma of `sinkhorn`. The paper uses 0.1, variant mcw_kd 0.0001."
    )
    top_k: Count = Field(
        50, description="Number of tokens that replace the vocabulary; at most the size of the smaller vocabulary."
    )
    temperature: Temperature = Field(
        1.0, description="Divides the logits in all other terms and for the order of the tokens. variant mcw_kd uses 2."
    )
    sequence_temperature: Temperature = Field(2.0, description="Divides the logits in `sinkhorn`.")
    regularisation: Positive = Field(0.1, description="Parameter lambda of the Sinkhorn iterations.")
    iterations: Count = Field(20, description="Number of Sinkhorn iterations. The paper uses 20, variant mcw_kd 10.")
    variant: Literal["paper", "mcw_kd"] = Field(
        "paper",
        description="paper, or mcw_kd for the port in the code of MCW-KD, the likely source of published tables. The port "
        "divides the logits by their standard deviation at each position, and applies a second softmax to the probabilities "
        "in `logarithmic` and `sinkhorn`. Its inclusion of prompt and padding is not reproduced.",
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

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        criterion = RankedLevels(self.options, student.target_ids, (student.lengths, teacher.lengths), ce_weight)
        return Terms.of(head_loss([head_rows(student), constant_rows(teacher)], criterion))


class RankedLevels(Criterion):
    """Compute `ce` at each student token, and the other terms as sums over examples with tokens of `lengths`."""

    unit = "examples"

    def __init__(
        self,
        options: MultiLevelOtOptions,
        targets: Int[Tensor, " tokens"],
        lengths: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]],
        ce_weight: float,
    ) -> None:
        super().__init__(
            {
                "ce": ce_weight,
                "absolute": options.ot_weight,
                "logarithmic": options.ot_weight * options.log_weight,
                "sinkhorn": options.ot_weight * options.sinkhorn_weight,
            }
        )
        self.options, self.targets, self.lengths = options, targets, lengths

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        assert chunk.examples is not None
        sizes = [lengths[chunk.examples] for lengths in self.lengths]
        possible = [is_possible(side) for side in logits]
        top = min(self.options.top_k, *(int(allowed.sum()) for allowed in possible))
        ce = cross_entropy(logits[0].t(), self.targets[chunk.rows[0]])
        parts = zip(logits, sizes, possible, strict=True)
        tops = [self._top(side.t(), lengths, allowed, top) for side, lengths, allowed in parts]
        return {"ce": ce, **self._compare(tops, sizes)}

    def _top(self, columns: Columns, lengths: Tensor, possible: Tensor, top: int) -> tuple[Top, Top]:
        """Return log-probabilities of an example's `top` most probable tokens at each position, at both temperatures."""
        options = self.options
        if options.variant == "mcw_kd":
            std = columns[possible].std(0, keepdim=True) + 1e-4
            columns = (columns.masked_fill(~possible[:, None], 0.0) / std).masked_fill(~possible[:, None], -torch.inf)
        examples = example_ids(lengths, columns.shape[1])
        mass = summed_probs(columns.detach(), examples, options.temperature).masked_fill(~possible[:, None], -1.0)
        order = mass.t().topk(top).indices[examples].t()
        softer = log_probs_at(columns, order, options.sequence_temperature)
        return log_probs_at(columns, order, options.temperature).t(), softer.t()

    def _compare(self, tops: Sequence[tuple[Top, Top]], sizes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the sum of each of the three terms."""
        (log_s, softer_s), (log_t, softer_t) = tops
        pairs = torch.minimum(*sizes)
        length = int(torch.stack(list(sizes)).max())
        inside = torch.arange(length, device=pairs.device) < pairs[:, None]
        s, t = (pad_rows(side, n, length)[inside] for side, n in zip((log_s, log_t), sizes, strict=True))
        absolute = (t.exp() - s.exp()).abs().sum()
        if self.options.variant == "mcw_kd":
            temperature = self.options.sequence_temperature
            softer = [(side.exp() / temperature).softmax(-1) for side in (log_s, log_t)]
            logarithmic = -(t.exp().softmax(-1) * s.exp().log_softmax(-1)).sum()
            factor = pairs.square()  # the port multiplies by the number of pairs once more
        else:
            softer = [softer_s.exp(), softer_t.exp()]
            logarithmic, factor = -(t.exp() * s).sum(), pairs
        own, theirs = (pad_rows(side, n, int(n.max())) for side, n in zip(softer, sizes, strict=True))
        cost = torch.cdist(theirs, own, p=1)
        transport = sinkhorn(cost, self.options.regularisation, self.options.iterations, sizes[1], sizes[0])
        return {"absolute": absolute, "logarithmic": logarithmic, "sinkhorn": (factor * transport).sum()}


def summed_probs(
    columns: Columns, examples: Int[Tensor, " tokens"], temperature: float
) -> Float[Tensor, "vocab examples"]:
    """Sum the probabilities over the positions of each example, block by block of the vocabulary."""
    total = log_total(columns, temperature)
    member = torch.nn.functional.one_hot(examples).to(columns.dtype)
    return torch.cat([(columns[block] / temperature - total).exp() @ member for block in blocks(columns)])
