"""Divergences between next-token distributions, per token, in nats.

Every function takes the log-probabilities of a target distribution p (the teacher's, usually detached) and of a
learned distribution q, both already softened, and returns one value per token. Gradient flows through whatever
carries it. All are >= 0, and 0 only where p = q unless `skew` is 1.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.kernels.head_loss import forward_kl

LogProbs = Float[Tensor, "tokens vocab"]
PerToken = Float[Tensor, " tokens"]


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """KL(q || p)."""
    return forward_kl(log_q, log_p)


def _mixture(log_p: LogProbs, log_q: LogProbs, p_share: float) -> LogProbs:
    """log(p_share * p + (1 - p_share) * q), without leaving log space."""
    if p_share in (0.0, 1.0):
        return log_p if p_share else log_q
    return torch.logaddexp(log_p + math.log(p_share), log_q + math.log1p(-p_share))


def skewed_forward_kl(log_p: LogProbs, log_q: LogProbs, skew: float = 0.1) -> PerToken:
    """KL(p || skew p + (1 - skew) q), at most -log(skew) (DistiLLM)."""
    return forward_kl(log_p, _mixture(log_p, log_q, skew))


def skewed_reverse_kl(log_p: LogProbs, log_q: LogProbs, skew: float = 0.1) -> PerToken:
    """KL(q || (1 - skew) p + skew q), at most -log(skew) (DistiLLM)."""
    return forward_kl(log_q, _mixture(log_p, log_q, 1.0 - skew))


def jensen_shannon(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Half of KL(p || m) + KL(q || m) with m = (p + q) / 2; symmetric, at most log 2."""
    mixture = _mixture(log_p, log_q, 0.5)
    return (forward_kl(log_p, mixture) + forward_kl(log_q, mixture)) / 2


def adaptive_kl(log_p: LogProbs, log_q: LogProbs, tail: float = 0.5) -> PerToken:
    """(g_head FKL + g_tail RKL) / (g_head + g_tail), the gaps |p - q| summed over head and tail, constants.

    The tail is the set of least probable tokens of p whose cumulative probability does not exceed `tail`.
    0 where p = q, where the gaps vanish.
    """
    p, q = log_p.detach().exp(), log_q.detach().exp()
    ascending, order = p.sort(-1)
    gap = (p - q).abs().gather(-1, order)
    in_tail = ascending.cumsum(-1) <= tail
    tail_gap = (gap * in_tail).sum(-1)
    head_gap = (gap * ~in_tail).sum(-1)
    total = (head_gap + tail_gap).clamp_min(torch.finfo(gap.dtype).tiny)
    return (head_gap * forward_kl(log_p, log_q) + tail_gap * reverse_kl(log_p, log_q)) / total


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "jensen_shannon": jensen_shannon,
    "adaptive_kl": adaptive_kl,
}


def divergence(name: str, skew: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of that name, with `skew` bound where it has one.

    Raises:
        ValueError: unknown name; lists the valid ones.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; valid ones: {', '.join(DIVERGENCES)}")
    if name.startswith("skewed"):
        return partial(DIVERGENCES[name], skew=skew)
    return DIVERGENCES[name]
