"""CDM: align tokens by spelling and entropy, and match the candidate tokens at each position (arXiv 2502.11104)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, entropy, forward_kl, head_loss
from dwakd.kernels.head_loss.statistics import LOG2_E, Softmax, blocks, peak_of, pick, scratch, shifted_exp, subtract_at
from dwakd.losses.attention import TeacherScale
from dwakd.losses.base import (
    Count,
    DistillationLoss,
    MethodOptions,
    Rate,
    Temperature,
    Terms,
    Weight,
    constant_rows,
    head_rows,
)
from dwakd.losses.dynamic_mapping import Columns, Groups, TokenMap, top_tokens, warp
from dwakd.losses.pair import ModelPair

MASKED = -1e4

PerGroup = Float[Tensor, " groups"]


class CdmOptions(MethodOptions):
    """Options of `CdmLoss`."""

    needs_models = "pair"

    method: Literal["cdm"] = "cdm"
    ce_weight: Weight = Field(0.9, description="Weight alpha of the cross-entropy. The published options use 0.9.")
    kd_weight: Weight = Field(0.1, description="1 - alpha.")
    temperature: Temperature = Field(
        0.8,
        description="Divides the logits of both models. There is no tau^2 factor. The published options use 0.8.",
    )
    top_k: Count = Field(100, description="Number of candidates of each model; at most the size of its vocabulary.")
    threshold: Rate = Field(
        0.3,
        description="Candidates match if their edit distance divided by the sum of their lengths is below this value. 0 "
        "allows exact matches only.",
    )


class CdmLoss(DistillationLoss[CdmOptions]):
    """Align tokens and match likely next tokens at every step, and compare the distributions over the matched tokens.

        L = ce_weight CE + kd_weight sum_g KL(t_g || s_g)

    Groups g come from dynamic time warping over the tokens that the models read. The cost of a pair of positions is the edit
    distance of their tokens times f^s f^t with f = floor(3 sigmoid(4e - 2) + 3), where e is the entropy at the position,
    scaled to 0 to 1 within the sequence. Positions that the path pairs without a diagonal step are one group, and the logits
    of a group are the mean of theirs. The candidates of a group are the top_k tokens of each model. A candidate is matched
    with the token of equal spelling in the other vocabulary. If there is none, it is matched with the nearest in spelling of
    those candidates of the other model that have none either. t_g and s_g are softmax(logits of matched tokens / tau).

    Gradient: the student's hidden states and head, through the logits of the candidates. Groups and candidates are constants.

    Args:
        pair: vocabularies and heads of the two models.

    References:
        Chen et al. 2025. Their code, pppa2019/ContexualDynamicMapping, is known to us from ports only. The ports divide only
        the student's logits by the temperature and multiply the teacher's log-probabilities by tau^2, so that their minimum
        is not where the models agree; here both logits are divided. The ports list a pair twice if both of its tokens are
        candidates; here it is listed once, so that one tokenizer gives the KL over the union of the candidates. The token
        read at the first position belongs to the prompt and counts as equal on both sides. The weights of an example's
        groups sum to its student tokens; the ports take the mean over groups and candidates.
    """

    options_type = CdmOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        self.token_map = TokenMap(pair, self.options.threshold)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale) -> Terms:
        output = head_loss([head_rows(student), constant_rows(teacher)], MappedCandidates(self, student, teacher))
        return Terms(output.terms, output.loss)


class MappedCandidates(Criterion):
    """Compute `ce` at each student token, and `kd` as a sum over groups.

    Args:
        loss: the loss, with its options and its map of tokens.
        student: the student's side.
        teacher: the teacher's side.
    """

    unit = "examples"

    def __init__(self, loss: CdmLoss, student: ModelSide, teacher: ModelSide) -> None:
        super().__init__({"ce": loss.options.ce_weight, "kd": loss.options.kd_weight})
        self.options, self.token_map, self.targets = loss.options, loss.token_map, student.target_ids
        self.lengths = [side.lengths.cpu() for side in (student, teacher)]
        self.texts = loss.token_map.read_texts((student, teacher))

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        sides = [logits[0], logits[1].detach()]
        groups, shares = self._warp([entropy(side.detach().log_softmax(-1)) for side in sides], chunk)
        merged = [group.means(side) for group, side in zip(groups, sides, strict=True)]
        tops = [side.detach().topk(min(self.options.top_k, side.shape[1])).indices for side in merged]
        ids, counts = self.token_map.pairs(*tops)
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
        ids, counts = self.token_map.pairs(*tops)
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
        """Add the gradient of each group's logits, divided equally among the positions of the group."""
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
    """Compute the softmax sums of each column at temperature 1. The logits are not modified."""
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
    """Overwrite the logits with rate x softmax."""
    for block in blocks(columns):
        shifted_exp(columns[block], side.peak).mul_(rate / side.total)
