"""CDM: rows aligned by spelling and entropy, and candidate tokens matched anew at every place (arXiv 2502.11104)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, entropy, forward_kl, head_loss
from dwakd.kernels.head_loss.statistics import LOG2_E, Softmax, blocks, peak_of, pick, scratch, shifted_exp, subtract_at
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    TEMPERATURES,
    DistillationLoss,
    Terms,
    check_range,
    constant_rows,
    head_rows,
)
from dwakd.losses.dynamic_mapping import Columns, Groups, TokenMap, top_tokens, warp
from dwakd.losses.pair import ModelPair

MASKED = -1e4

PerGroup = Float[Tensor, " groups"]


class CdmLoss(DistillationLoss):
    """L = ce_weight CE + kd_weight sum_g KL(t_g || s_g), t_g and s_g softmax(logits of matched tokens / temperature).

    Dynamic time warping over the tokens that rows *read* gives the groups g: the cost of two rows is the edit distance
    of their tokens times f^s f^t, f = floor(3 sigmoid(4e - 2) + 3), with e the row's entropy from 0 to 1 within its
    sequence. Rows that the path pairs without a diagonal step are one group, whose logits are their mean. Candidates are
    the top_k tokens of either side. A candidate's counterpart is the token that spells the same; where there is none,
    the nearest in spelling of the other side's candidates that have none either.

    Gradient: the student's rows and head, through the logits of candidates; groups and candidates are constants.

    Args:
        pair: vocabularies and heads.
        ce_weight: alpha; 0.9 in the published options.
        kd_weight: 1 - alpha.
        temperature: tau, of both sides; no tau^2 factor. 0.8 in the published options.
        top_k: candidates of each side; fewer where a vocabulary has fewer.
        threshold: edit distance over the sum of both lengths, below which candidates match; 0 for exact matches alone.

    Raises:
        ValueError: an option out of range.

    References:
        Chen et al. 2025; their code is pppa2019/ContexualDynamicMapping, known to us from ports of it. These soften the
        student only and multiply the teacher's log-probabilities by tau^2, so that the least loss is not where the models
        agree: here both are softened. They list a pair twice that the candidates of both sides lead to: here once, so that
        one tokenizer gives the KL over the union of the candidates. What the first row reads belongs to the prompt and
        counts as equal on both sides. The groups of an example weigh as many tokens as it has; in the ports the mean
        is over groups and candidates.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")
    needs_pair: ClassVar[bool] = True

    def __init__(
        self,
        *,
        pair: ModelPair,
        ce_weight: float = 0.9,
        kd_weight: float = 0.1,
        temperature: float = 0.8,
        top_k: int = 100,
        threshold: float = 0.3,
    ) -> None:
        super().__init__()
        infinite = float("inf")
        check_range(
            ce_weight=(ce_weight, 0, infinite),
            kd_weight=(kd_weight, 0, infinite),
            temperature=(temperature, *TEMPERATURES),
            top_k=(top_k, 1, infinite),
            threshold=(threshold, 0, 1),
        )
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.temperature, self.top_k = temperature, top_k
        self.vocabularies = pair.vocabularies
        self.token_map = TokenMap(pair, threshold)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        output = head_loss([head_rows(student), constant_rows(teacher)], MappedCandidates(self, student, teacher))
        return Terms(output.terms, output.loss)


class MappedCandidates(Criterion):
    """Terms `ce` per student row, and `kd` summed over groups.

    Args:
        options: of the method.
        student: the rows.
        teacher: likewise.
    """

    unit = "examples"

    def __init__(self, options: CdmLoss, student: ModelSide, teacher: ModelSide) -> None:
        super().__init__({"ce": options.ce_weight, "kd": options.kd_weight})
        self.options, self.targets = options, student.target_ids
        self.lengths = [side.lengths.cpu() for side in (student, teacher)]
        self.texts = options.token_map.read_texts((student, teacher))

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        sides = [logits[0], logits[1].detach()]
        groups, shares = self._warp([entropy(side.detach().log_softmax(-1)) for side in sides], chunk)
        merged = [group.means(side) for group, side in zip(groups, sides, strict=True)]
        tops = [side.detach().topk(min(self.options.top_k, side.shape[1])).indices for side in merged]
        ids, counts = self.options.token_map.pairs(*tops)
        values = [side.gather(1, tokens) for side, tokens in zip(merged, ids, strict=True)]
        ce = torch.nn.functional.cross_entropy(logits[0], self.targets[chunk.rows[0]], reduction="none")
        return {"ce": ce, "kd": (shares * self._divergence(values, counts)).sum()}

    def differentiate(
        self,
        logits: Sequence[Tensor],
        chunk: Chunk,
        statistics: dict[str, Tensor],
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> dict[str, Tensor]:
        columns, targets = [side.t() for side in logits], self.targets[chunk.rows[0]]
        own, other = (measured(side) for side in columns)
        ce = own.total.log() + own.peak - pick(columns[0], targets)
        groups, shares = self._warp([own.entropy(), other.entropy()], chunk)
        kept = [group.merge(side) for group, side in zip(groups, columns, strict=True)]
        places = [group.firsts for group in groups]
        tops = [top_tokens(side, rows, self.options.top_k) for side, rows in zip(columns, places, strict=True)]
        ids, counts = self.options.token_map.pairs(*tops)
        values = [side[tokens, rows[:, None]] for side, tokens, rows in zip(columns, ids, places, strict=True)]
        leaf = values[0].requires_grad_()
        with torch.enable_grad():
            kd = (shares * self._divergence((leaf, values[1]), counts)).sum()
            (slopes,) = torch.autograd.grad(kd, leaf)
        if needs[0]:
            groups[0].restore(columns[0], kept[0])
            softmax_(columns[0], own, self.rates["ce"])
            subtract_at(columns[0], targets, torch.full_like(ce, self.rates["ce"]))
            self._add_slopes(columns[0], groups[0], ids[0], slopes)
        return {"ce": ce, "kd": kd.detach()}

    def _add_slopes(self, gradient: Columns, groups: Groups, ids: Tensor, slopes: Tensor) -> None:
        """Each row of a group gets its part of what the group's logits get."""
        rows = groups.of_rows()
        shares = self.rates["kd"] * slopes / groups.sizes[:, None]
        gradient.t().scatter_add_(1, ids[rows], shares[rows])

    def _warp(self, entropies: Sequence[Tensor], chunk: Chunk) -> tuple[list[Groups], PerGroup]:
        assert chunk.examples is not None
        texts = [texts[rows] for texts, rows in zip(self.texts, chunk.rows, strict=True)]
        return warp(entropies, texts, [lengths[chunk.examples] for lengths in self.lengths])

    def _divergence(self, values: Sequence[Float[Tensor, "groups pairs"]], counts: Tensor) -> PerGroup:
        log_q, log_p = (
            (side.masked_fill(~counts, MASKED) / self.options.temperature).log_softmax(-1) for side in values
        )
        return forward_kl(log_p, log_q)


def measured(columns: Columns) -> Softmax:
    """The sums of each column at temperature 1; the logits stay as they are."""
    side = Softmax(peak_of(columns))
    work = scratch(columns, 2)
    for block in blocks(columns):
        x, power = (buffer[: block.stop - block.start] for buffer in work)
        torch.exp2(torch.sub(columns[block], side.peak, out=x).mul_(LOG2_E), out=power)
        side.total += power.sum(0)
        side.energy += power.mul_(x).sum(0)
    side.energy /= LOG2_E
    return side


def softmax_(columns: Columns, side: Softmax, rate: float) -> None:
    """The logits give way to rate x softmax."""
    for block in blocks(columns):
        shifted_exp(columns[block], side.peak).mul_(rate / side.total)
