"""Criteria of MultiLevelOT: terms of the tokens that are most probable over a whole response."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dwakd.kernels.head_loss import Chunk, Criterion
from dwakd.kernels.head_loss.criterion import Logits, Statistics
from dwakd.kernels.head_loss.statistics import (
    blocks,
    is_possible,
    peak_of,
    pick,
    raise_to,
    scratch,
    shifted_exp,
    subtract_at,
)
from dwakd.kernels.sinkhorn import sinkhorn
from dwakd.losses.packing import example_ids, pad_rows

Columns = Float[Tensor, "vocab tokens"]
Top = Float[Tensor, "_ top"]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Levels:
    """Options of `MultiLevelOtLoss` that its criteria use. See there."""

    top_k: int
    temperature: float
    sequence_temperature: float
    regularisation: float
    iterations: int


class RankedLevels(Criterion):
    """Compute the terms `ce`, `absolute`, `logarithmic` and `sinkhorn` of two sides with any numbers of tokens.

    Args:
        targets: the target token at each position of the student.
        lengths: tokens per example, of the student and of the teacher.
        levels: options.
        rates: weight of each term in the loss.
    """

    unit = "examples"

    def __init__(
        self,
        targets: Int[Tensor, " tokens"],
        lengths: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]],
        levels: Levels,
        rates: dict[str, float],
    ) -> None:
        super().__init__(rates)
        self.targets, self.lengths, self.levels = targets, lengths, levels

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> Terms:
        levels, sizes = self.levels, self._sizes(chunk)
        possible = [is_possible(side) for side in logits]
        top = self._top(possible)
        tops = []
        for side, lengths, allowed in zip(logits, sizes, possible, strict=True):
            log_probs, log_softer = (
                (side / temperature).log_softmax(-1)
                for temperature in (levels.temperature, levels.sequence_temperature)
            )
            probs = log_probs.detach().exp().masked_fill(~allowed, -1.0)  # never among the largest
            mass = [part.sum(0) for part in torch.split(probs, lengths.tolist())]
            order = torch.stack([row.topk(top).indices for row in mass])[example_ids(lengths, len(side))]
            tops.append((log_probs.gather(-1, order), log_softer.gather(-1, order)))
        ce = torch.nn.functional.nll_loss(logits[0].log_softmax(-1), self.targets[chunk.rows[0]], reduction="none")
        return {"ce": ce, **self._compare(tops, sizes)}

    def _top(self, possible: Sequence[Bool[Tensor, " _"]]) -> int:
        """Number of tokens that replace the vocabulary: at most as many as each head can predict."""
        return min(self.levels.top_k, *(int(allowed.sum()) for allowed in possible))

    def _sizes(self, chunk: Chunk) -> list[Tensor]:
        assert chunk.examples is not None
        return [lengths[chunk.examples] for lengths in self.lengths]

    def _compare(self, tops: Sequence[tuple[Top, Top]], sizes: Sequence[Tensor]) -> Terms:
        """Compute the sum of each of the three terms from log-probabilities of the top tokens at both temperatures."""
        (log_s, softer_s), (log_t, softer_t) = tops
        log_s, log_t = _paired(log_s, log_t, sizes)
        return {
            "absolute": (log_t.exp() - log_s.exp()).abs().sum(),
            "logarithmic": -(log_t.exp() * log_s).sum(),
            "sinkhorn": self._transport(softer_s.exp(), softer_t.exp(), sizes).sum(),
        }

    def _transport(self, student: Top, teacher: Top, sizes: Sequence[Tensor]) -> Float[Tensor, " batch"]:
        """n x transport cost between the teacher's and the student's positions, for each example."""
        padded = [pad_rows(rows, n, int(n.max())) for rows, n in zip((teacher, student), sizes[::-1], strict=True)]
        cost = torch.cdist(padded[0], padded[1], p=1)
        # an example without tokens on one side has nothing to transport
        lengths = [n.clamp_min(1) for n in sizes]
        values = sinkhorn(cost, self.levels.regularisation, self.levels.iterations, lengths[1], lengths[0])
        return torch.minimum(*sizes) * values

    def differentiate(
        self,
        logits: Sequence[Logits],
        chunk: Chunk,
        statistics: Statistics,
        weights: Tensor | None,
        needs: Sequence[bool],
    ) -> Terms:
        """Compute terms and gradient: by hand over the vocabulary, by autograd over the top tokens."""
        sizes = self._sizes(chunk)
        possible = [is_possible(side) for side in logits]
        top = self._top(possible)
        targets = self.targets[chunk.rows[0]]
        temperatures = (self.levels.temperature, self.levels.sequence_temperature)
        chosen = pick(logits[0].t(), targets)
        sides = [
            _Side(side.t(), lengths, top, temperatures, allowed)
            for side, lengths, allowed in zip(logits, sizes, possible, strict=True)
        ]
        own = sides[0]
        tops = [side.tops() for side in sides]
        leaves = tuple(part.requires_grad_() for part in tops[0])
        with torch.enable_grad():
            compared = self._compare((leaves, tops[1]), sizes)  # type: ignore[arg-type]
            total = torch.stack([self.rates[name] * value for name, value in compared.items()]).sum()
        if needs[0]:
            slopes = torch.autograd.grad(total, leaves)
            own.overwrite(temperatures, slopes, self.rates["ce"])
            subtract_at(own.kept, targets, torch.full_like(chosen, self.rates["ce"]))
        ce = own.totals[1.0].log() + own.peak - chosen
        return {"ce": ce, **{name: value.detach() for name, value in compared.items()}}


class _Side:
    """Logits (vocab, tokens) of one model, overwritten with kept = exp((logit - peak) / base), and their sums.

    One exponential is enough for all temperatures: softmax(logits / temperature) = kept ** (base / temperature) / total.
    """

    def __init__(
        self, logits: Columns, lengths: Tensor, top: int, temperatures: tuple[float, float], possible: Tensor
    ) -> None:
        self.base = max(1.0, *temperatures)
        self.temperatures = temperatures
        self.kept, self.peak = logits, peak_of(logits)
        self.totals = {temperature: torch.zeros_like(self.peak) for temperature in {1.0, *temperatures}}
        (work,) = scratch(logits, 1)
        for block in blocks(logits):
            kept = shifted_exp(logits[block], self.peak, self.base)
            for temperature, total in self.totals.items():
                total += raise_to(kept, self.base / temperature, work[: len(kept)]).sum(0)
        examples = example_ids(lengths, logits.shape[1])
        shares = torch.nn.functional.one_hot(examples, len(lengths)).to(logits.dtype)
        shares = shares / self.totals[temperatures[0]][:, None]
        mass = torch.cat(
            [
                raise_to(logits[b], self.base / temperatures[0], work[: b.stop - b.start]) @ shares
                for b in blocks(logits)
            ]
        )
        self.order = mass.masked_fill_(~possible[:, None], -1.0).t().topk(top).indices[examples]

    def tops(self) -> tuple[Top, Top]:
        """Log-probabilities of the top tokens at each position and both temperatures.

        They are clamped at 87 x base below the largest one.
        """
        kept = self.kept.t().gather(-1, self.order)
        logs = kept.clamp_min(torch.finfo(kept.dtype).tiny).log() * self.base
        first, second = (
            logs / temperature - self.totals[temperature].log()[:, None] for temperature in self.temperatures
        )
        return first, second

    def overwrite(self, temperatures: tuple[float, float], slopes: Sequence[Top], ce_rate: float) -> None:
        """Overwrite `kept` with the gradient of the logits: that of `ce` without its targets, and that through `tops`."""
        factors = {temperature: torch.zeros_like(self.peak) for temperature in self.totals}
        factors[1.0] += ce_rate
        direct = torch.zeros_like(slopes[0])
        for temperature, slope in zip(temperatures, slopes, strict=True):
            factors[temperature] -= slope.sum(-1) / temperature
            direct += slope / temperature
        first, second = scratch(self.kept, 2)
        for block in blocks(self.kept):
            kept = self.kept[block]
            power, total = first[: len(kept)], second[: len(kept)].zero_()
            for temperature, factor in factors.items():
                total.addcmul_(raise_to(kept, self.base / temperature, power), factor / self.totals[temperature])
            kept.copy_(total)
        self.kept.t().scatter_add_(-1, self.order, direct)


class PortLevels(RankedLevels):
    """`RankedLevels` with the formulas of MCW-KD's code, applied to response tokens only."""

    def terms(self, logits: Sequence[Logits], chunk: Chunk, weights: Tensor | None) -> Terms:
        scaled = [_standardised(side) for side in logits]
        ce = torch.nn.functional.nll_loss(logits[0].log_softmax(-1), self.targets[chunk.rows[0]], reduction="none")
        return super().terms(scaled, chunk, weights) | {"ce": ce}

    def _compare(self, tops: Sequence[tuple[Top, Top]], sizes: Sequence[Tensor]) -> Terms:
        student, teacher = (top[0].exp() for top in tops)
        s, t = _paired(student, teacher, sizes)
        softer = [(side / self.levels.sequence_temperature).softmax(-1) for side in (student, teacher)]
        return {
            "absolute": (t - s).abs().sum(),
            "logarithmic": -(t.softmax(-1) * s.log_softmax(-1)).sum(),
            # the port multiplies by the number of pairs once more
            "sinkhorn": (torch.minimum(*sizes) * self._transport(softer[0], softer[1], sizes)).sum(),
        }

    differentiate = Criterion.differentiate


def _standardised(logits: Logits) -> Logits:
    """Divide the logits at each position by their standard deviation over the tokens that the head does not forbid."""
    possible = is_possible(logits)
    std = logits[:, possible].std(-1, keepdim=True) + 1e-4
    return (logits.masked_fill(~possible, 0.0) / std).masked_fill(~possible, -torch.inf)


def _paired(student: Top, teacher: Top, sizes: Sequence[Tensor]) -> tuple[Top, Top]:
    """The first n = min(S, T) positions of each example on both sides."""
    pairs = torch.minimum(*sizes)
    length = int(torch.stack(list(sizes)).max())
    inside = torch.arange(length, device=pairs.device) < pairs[:, None]
    first, second = (pad_rows(rows, n, length)[inside] for rows, n in zip((student, teacher), sizes, strict=True))
    return first, second
