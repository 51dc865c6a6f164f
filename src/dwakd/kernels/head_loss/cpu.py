"""Compute `SoftenedPair` in one pass over the logits of both sides, for float32 on a CPU and temperature 1 or 2.

The plain torch version makes about ten passes.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.kernels.compiled import share
from dwakd.kernels.head_loss.cpu_sweep import SUMS, sweep_gradient, sweep_observe, sweep_peak

SPAN = 4096
"""Number of vocabulary entries that a thread computes at a time. The sums of these spans are added in order, so the
result does not depend on the number of threads."""


def observe(
    learned: Float[Tensor, "vocab tokens"],
    target: Float[Tensor, "vocab tokens"],
    peaks: Float[Tensor, "2 tokens"],
    base: float,
) -> Float[Tensor, "7 tokens"]:
    """Overwrite the logits of both sides with exp((logit - peak) / base) and compute sums over the vocabulary.

    Returns:
        total, soft_total and energy of `learned`, the same of `target`, and cross, as in `SoftenedPair.observe`.
        Logarithms have base 2 and are not yet divided by `base`.
    """
    spans = _spans(len(learned))
    sums = np.zeros((len(spans), SUMS * learned.shape[1]))
    arguments = peaks.contiguous().view(-1).numpy(), learned.shape[1], np.float32(math.log2(math.e) / base), base == 2.0
    sides = [*_flat(learned), *_flat(target)]
    share(lambda first, last: sweep_observe(*sides, first, last, *arguments, sums[first // SPAN]), spans)
    return torch.from_numpy(sums.sum(0)).to(learned.dtype).view(SUMS, -1)


def gradient(
    learned: Float[Tensor, "vocab tokens"],
    target: Float[Tensor, "vocab tokens"],
    shares: Float[Tensor, "shares tokens"],
    base: float,
) -> None:
    """Overwrite the result of `observe` with the gradient: learned <- shares[0] learned - shares[1] target.

    With four shares, learned also gets + shares[2] learned ** base, and target <- shares[3] target ** base.
    """
    arguments = shares.contiguous().view(-1).numpy(), learned.shape[1], base == 2.0, len(shares) == 4
    sides = [*_flat(learned), *_flat(target)]
    share(lambda first, last: sweep_gradient(*sides, first, last, *arguments), _spans(len(learned)))


def most_probable(logits: Float[Tensor, "vocab tokens"]) -> Int[Tensor, " tokens"]:
    """Return the token id of the largest logit in each column; the first one if several are equal."""
    tokens, spans = logits.shape[1], _spans(len(logits))
    flat, best = _flat(logits), np.full((len(spans), tokens), -np.inf, np.float32)
    rows = np.zeros((len(spans), tokens), np.int32)
    share(lambda first, last: sweep_peak(*flat, first, last, best[first // SPAN], rows[first // SPAN]), spans)
    return torch.from_numpy(rows[best.argmax(0), np.arange(tokens)].astype(np.int64))


def _flat(logits: Float[Tensor, "vocab tokens"]) -> tuple[npt.NDArray[np.float32], int]:
    """Return the memory of the logits as a flat array, and the distance between vocabulary entries in it."""
    vocab, tokens = logits.shape
    step = logits.stride(0)
    return torch.as_strided(logits.detach(), ((vocab - 1) * step + tokens,), (1,)).numpy(), step


def _spans(vocab: int) -> list[tuple[int, int]]:
    return [(start, min(start + SPAN, vocab)) for start in range(0, vocab, SPAN)]
