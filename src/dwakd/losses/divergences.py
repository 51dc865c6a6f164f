"""Divergences between next-token distributions, per token, in nats.

Every divergence takes the log-probabilities of a target distribution p (the teacher's, usually detached) and of a learned
distribution q, both with the temperature already applied, and returns one value per token. Gradient flows to both unless
they are detached. All values are at least 0, and 0 only for p = q unless `skew` is 1.

A log-probability may be -inf. A token with -inf in both adds nothing and gets zero gradient. For a token with -inf in only
one of them, the value is the mathematical one: the forward KL is infinite if q is 0 and p is not, the reverse KL if p is 0
and q is not, and the adaptive KL in both cases. The skewed divergences and Jensen-Shannon are finite.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss import HeadLoss, HeadRows, active_weights, forward_kl, head_loss, student_space
from dwakd.kernels.sorted_distance import sorted_distance

LogProbs = Float[Tensor, "tokens vocab"]
PerToken = Float[Tensor, " tokens"]
Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Compute the reverse Kullback-Leibler divergence KL(q || p)."""
    return forward_kl(log_q, log_p)


def mixture(log_p: LogProbs, log_q: LogProbs, p_share: float) -> LogProbs:
    """Compute log(p_share * p + (1 - p_share) * q) in log space.

    A token with -inf in both gets the lowest finite number, because the gradient of logaddexp(-inf, -inf) is NaN.
    """
    if p_share in (0.0, 1.0):
        return log_p if p_share else log_q
    lowest = torch.finfo(log_q.dtype).min
    return torch.logaddexp(log_p + math.log(p_share), (log_q + math.log1p(-p_share)).clamp_min(lowest))


def skewed_forward_kl(log_p: LogProbs, log_q: LogProbs, skew: float = 0.1) -> PerToken:
    """Compute KL(p || skew p + (1 - skew) q), at most -log(skew) (DistiLLM)."""
    return forward_kl(log_p, mixture(log_p, log_q, skew))


def skewed_reverse_kl(log_p: LogProbs, log_q: LogProbs, skew: float = 0.1) -> PerToken:
    """Compute KL(q || (1 - skew) p + skew q), at most -log(skew) (DistiLLM)."""
    return forward_kl(log_q, mixture(log_p, log_q, 1.0 - skew))


def jensen_shannon(log_p: LogProbs, log_q: LogProbs) -> PerToken:
    """Compute (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. It is symmetric and at most log 2."""
    mean = mixture(log_p, log_q, 0.5)
    return (forward_kl(log_p, mean) + forward_kl(log_q, mean)) / 2


def adaptive_kl(log_p: LogProbs, log_q: LogProbs, tail: float = 0.5) -> PerToken:
    """Compute a mean of forward and reverse KL, weighted by where p and q differ (Wu et al. 2024).

        (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail)

    The tail is the set of least probable tokens of p whose cumulative probability does not exceed `tail`; the head is the
    rest. g_head and g_tail are the sums of |p - q| over head and tail, as constants. For p = q the value is 0.
    """
    p, q = log_p.detach().exp(), log_q.detach().exp()
    ascending, order = p.sort(-1)
    gap = (p - q).abs().gather(-1, order)
    in_tail = ascending.cumsum(-1) <= tail
    tail_gap = (gap * in_tail).sum(-1)
    head_gap = (gap * ~in_tail).sum(-1)
    total = head_gap + tail_gap
    total = torch.where(total > 0, total, 1.0)
    return head_gap / total * forward_kl(log_p, log_q) + tail_gap / total * reverse_kl(log_p, log_q)


SKEWED: dict[str, Callable[..., Tensor]] = {
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}
"""Divergences with the argument `skew`."""
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    **SKEWED,
    "jensen_shannon": jensen_shannon,
    "adaptive_kl": adaptive_kl,
}
"""All divergences, by the name that an option gives to them."""
if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]


def divergence(name: DivergenceName, skew: float) -> Divergence:
    """Return the divergence with this name. `skew` applies to those in `SKEWED` only."""
    return partial(SKEWED[name], skew=skew) if name in SKEWED else DIVERGENCES[name]


def sorted_difference(p: Float[Tensor, "rows p_vocab"], q: Float[Tensor, "rows q_vocab"]) -> Float[Tensor, " rows"]:
    """Sum |p - q| with both sorted in descending order; the shorter one is padded with zeros. Gradient flows to q only."""
    q = q.contiguous()
    value, slope = sorted_distance(q, p.contiguous())
    linear = (slope * q).sum(-1)
    return linear + (value - linear).detach()


def compare_with_teacher(
    sides: Sequence[HeadRows],
    divergence: Divergence,
    temperature: float,
    targets: Int[Tensor, " tokens"] | None = None,
    *,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    token_weights: PerToken | None = None,
) -> HeadLoss:
    """Compute the cross-entropy `ce` and the divergence `kd` of student and teacher, whose heads predict the same tokens.

    The teacher's side is a constant. `targets` may be None if `ce_weight` is 0. `token_weights` are constant factors of the
    divergence at each token.
    """
    count, rates = len(sides[0].hidden), active_weights({"ce": ce_weight, "kd": kd_weight})
    space = student_space(divergence)(
        first_possible(sides[0].head, count) if targets is None else targets,
        temperature,
        {},
        divergence=divergence,
        projected_targets=first_possible(sides[1].head, count),  # `StudentSpace` needs targets of the teacher as well
        token_weights=token_weights,
    )
    space.rates = {"ce": rates["ce"], "t2s_ce": 0.0, "kd_student": rates["kd"]}
    output = head_loss(sides, space)
    return HeadLoss(output.loss, {"ce": output.terms["ce"], "kd": output.terms["kd_student"]}, {})


def first_possible(head: OutputHead, count: int) -> Int[Tensor, " tokens"]:
    """Return the first token that the head does not forbid, `count` times."""
    return (~head.forbidden).int().argmax().expand(count)
