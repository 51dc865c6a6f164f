"""Compute token weights from the uncertainty of student and teacher (DWA-KD, equations 7, 8, 11, 12, 14)."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dwakd.losses.sides import example_ids

Weights = Float[Tensor, " tokens"]


def rescale(weights: Weights, lengths: Int[Tensor, " batch"]) -> Weights:
    """Rescale the weights of each example so that they sum to its number of tokens. Weights that are all zero stay zero."""
    examples = example_ids(lengths, weights.shape[0])
    sums = weights.new_zeros(lengths.shape[0]).index_add(0, examples, weights)[examples]
    return torch.where(sums > 0, weights / sums, 0.0) * lengths[examples]


def student_weights(
    student_entropy: Weights,
    gate: Weights,
    lengths: Int[Tensor, " batch"],
    *,
    use_entropy: bool = True,
    use_gate: bool = True,
    normalise: str = "product",
    kept: Shaped[Tensor, " tokens"] | None = None,
) -> Weights:
    """Compute the weight of each student token from the student's entropy and the projected teacher's confidence.

        w_i = H(p^s_i) * max_v p^{t->s}_i(v), rescaled    (equations 7, 11, 12), both at temperature 1

    `normalise` "entropy_then_gate" (published code) rescales the entropy and then multiplies by the gate, so that the weights
    sum to less than the number of tokens. `kept` is 0 for tokens that are left out and 1 for the others.
    """
    weights = student_entropy if use_entropy else torch.ones_like(student_entropy)
    weights = weights if kept is None else weights * kept
    if not use_gate:
        return rescale(weights, lengths)
    if normalise == "entropy_then_gate":
        return rescale(weights, lengths) * gate
    return rescale(weights * gate, lengths)


def certainty(entropy: Weights, vocab_size: int | Int[Tensor, ""]) -> Weights:
    """Compute 1 - H(p^t_j) / log V_t at each token (equation 8), for a head that allows V_t tokens.

    Values that are only rounding errors are set to 0, because rescaling would turn them into full weights.
    """
    largest = vocab_size.to(entropy.dtype).log() if isinstance(vocab_size, Tensor) else math.log(vocab_size)
    value = 1 - entropy / largest
    return value.masked_fill(value < 16 * torch.finfo(value.dtype).eps, 0.0)


def teacher_weights(
    entropy: Weights,
    vocab_size: int | Int[Tensor, ""],
    lengths: Int[Tensor, " batch"],
    kept: Bool[Tensor, " tokens"] | None = None,
) -> Weights:
    """Compute the weight of each teacher token: its certainty, rescaled over the tokens that are kept (equations 8, 14)."""
    weights = certainty(entropy, vocab_size)
    return rescale(weights if kept is None else weights * kept, lengths)
