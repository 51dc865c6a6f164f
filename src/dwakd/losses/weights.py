"""Dual-space entropy weights (DWA-KD, section 3.2, equations 7, 8, 11, 12, 14). Constants: no gradient."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.losses.packing import example_ids

Weights = Float[Tensor, " tokens"]


def rescale(weights: Weights, lengths: Int[Tensor, " batch"]) -> Weights:
    """Rescale the weights of each sequence so that they sum to its number of tokens.

    A sequence whose weights are all zero keeps them: zero, never NaN.
    """
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
) -> Weights:
    """w_i = H(p^s_i) * max_v p^{t->s}_i(v), rescaled (equations 7, 11, 12).

    Args:
        student_entropy: H(p^s_i), at temperature 1.
        gate: peak confidence of the projected teacher, at temperature 1.
        lengths: tokens per example.
        use_entropy: the paper's ablation "entropy weights".
        use_gate: the paper's ablation "gate".
        normalise: "product" rescales H * g (the paper); "entropy_then_gate" rescales H and multiplies by g afterwards
            (the published code), which shrinks the sum to the mean gate.
    """
    weights = student_entropy if use_entropy else torch.ones_like(student_entropy)
    if not use_gate:
        return rescale(weights, lengths)
    if normalise == "entropy_then_gate":
        return rescale(weights, lengths) * gate
    return rescale(weights * gate, lengths)


def certainty(entropy: Weights, vocab_size: int | Int[Tensor, ""]) -> Weights:
    """1 - H(p^t_j) / log V_t (equation 8); 0 where it is but rounding, which rescaling would blow up to full weight.

    Args:
        entropy: H(p^t_j), at temperature 1.
        vocab_size: V_t, without the tokens that the head forbids, `OutputHead.num_possible`.
    """
    largest = vocab_size.to(entropy.dtype).log() if isinstance(vocab_size, Tensor) else math.log(vocab_size)
    value = 1 - entropy / largest
    return value.masked_fill(value < 16 * torch.finfo(value.dtype).eps, 0.0)


def teacher_weights(
    teacher_entropy: Weights, vocab_size: int | Int[Tensor, ""], lengths: Int[Tensor, " batch"]
) -> Weights:
    """w_j = 1 - H(p^t_j) / log V_t, rescaled (equations 8, 14)."""
    return rescale(certainty(teacher_entropy, vocab_size), lengths)
