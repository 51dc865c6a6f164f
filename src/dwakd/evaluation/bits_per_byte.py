"""Bits per byte, a likelihood that can be compared between models with different tokenizers, and calibration."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dwakd.batch import ModelSide
from dwakd.data.collator import collate
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import Example
from dwakd.evaluation.generate import Model, max_positions, progress_bar
from dwakd.models.rows import evaluating, response_side

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 2**24
"""The head is applied to slices of about this many logits (64 MB in float32)."""
NUM_BINS = 15
"""Bins of the calibration error, as in Guo et al."""


@dataclass(frozen=True)
class BitsPerByte:
    """Likelihood and calibration of the responses given their prompts, over all tokens of a set."""

    value: float
    """bits / bytes"""
    bits: float
    """Minus log2 of the probability of all response tokens, including the end-of-sequence tokens."""
    bytes: int
    """UTF-8 bytes of the responses; an end-of-sequence token has none."""
    num_examples: int
    num_truncated: int
    """Responses that were cut. Two tokenizers cut at different places: compare their values only if both are 0."""
    ece: float
    """Expected calibration error of the response tokens, in percent; see `calibration_gaps`."""
    rows: tuple[tuple[int, float, int], ...] = ()
    """Index, bits and bytes of each example."""
    row_gaps: tuple[tuple[float, ...], ...] = ()
    """The gaps of each example of `rows` in the bins of `calibration_gaps`, and its number of tokens."""


def bits_per_byte(
    model: Model,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> BitsPerByte | None:
    """Compute the bits of every response, given its prompt, per UTF-8 byte of the responses, and the calibration error.

    The softmax is over all outputs of the head, including those without a token. A response is cut by text as in
    training. Rows without a response, and rows whose prompt leaves no room for one, are left out and are not in
    `num_examples`; a warning reports the latter.

    Args:
        batch_size: examples in one forward pass; changes the speed, not the value.
        max_length: most tokens of prompt and response together; the model's positions if those are fewer.

    Returns:
        The result, or None if no row has a response that fits.
    """
    max_length = min(max_length, max_positions(model))
    answered = [each for each in map(encoder.with_response, examples) if each.response.strip()]
    prompts = encoder.prompt_ids_batch(answered) if answered else []
    scored = [example for example, prompt in zip(answered, prompts, strict=True) if len(prompt) < max_length]
    if left_out := len(answered) - len(scored):
        reason = f"their prompts fill {max_length} tokens"
        logger.warning("bits per byte leaves out %d of %d rows: %s", left_out, len(examples), reason)
    if not scored:
        return None
    pairs = encode_pairs(
        scored,
        encoder,
        max_length=max_length,
        max_prompt_length=max_length - 1,
        source="evaluation data",
        length_option=None,  # num_truncated is part of the result
    )
    lengths = pairs.student_lengths
    alike = Subset(pairs, sorted(range(len(pairs)), key=lambda row: -lengths[row]))
    found: list[tuple[tuple[int, float, int], tuple[float, ...]]] = []
    loader = DataLoader(alike, batch_size=batch_size, collate_fn=collate)
    with evaluating(model), torch.no_grad(), progress_bar(disable=not progress) as bar:
        for batch in bar.track(loader, description="bits per byte"):
            side = response_side(model, batch.to(model.device).student)
            ends = side.byte_ends[side.lengths.cumsum(0) - 1].tolist()  # of the last tokens
            parts = zip(*(torch.split(values, list(side.counts)) for values in _predictions(side)), strict=True)
            for index, end, (nats, *confidence) in zip(batch.example_ids, ends, parts, strict=True):
                row_gaps = (*calibration_gaps(*confidence).tolist(), len(nats))
                found.append(((index, nats.sum().item() / math.log(2), end), row_gaps))
    rows, gaps = zip(*sorted(found), strict=True)
    bits, num_bytes = sum(row[1] for row in rows), sum(row[2] for row in rows)
    *sums, num_tokens = map(sum, zip(*gaps, strict=True))
    ece = 100 * sum(map(abs, sums)) / num_tokens
    return BitsPerByte(bits / num_bytes, bits, num_bytes, len(pairs), pairs.num_truncated, ece, rows, gaps)


def text_encoder(tokenizer: Any) -> TextEncoder:
    """Return an encoder that gives each response the empty prompt: the tokens at the beginning of any text.

    A tokenizer that adds no such token, as GPT-2's and Qwen's, begins a text with its end-of-sequence token, which
    separates documents.
    """
    encoder = TextEncoder(tokenizer, "{instruction}")
    if encoder.prompt_ids(Example(0, "")):
        return encoder
    separator = tokenizer.eos_token.replace("{", "{{").replace("}", "}}")
    return TextEncoder(tokenizer, separator + "{instruction}")


def _predictions(
    side: ModelSide,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Compute -log p of each target, the probability of the likeliest token, and whether this is the target."""
    rows = max(1, LOGITS_AT_ONCE // side.head.vocab_size)
    parts = []
    for hidden, targets in zip(torch.split(side.hidden, rows), torch.split(side.target_ids, rows), strict=True):
        logits = side.head.logits(hidden)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        top, predicted = logits.max(dim=-1)
        normaliser = losses + logits.gather(1, targets[:, None]).squeeze(1)
        parts.append((losses.cpu().double(), (top - normaliser).exp().cpu(), (predicted == targets).cpu()))
    nats, confidence, correct = (torch.cat(values) for values in zip(*parts, strict=True))
    return nats, confidence, correct


def calibration_gaps(confidence: Float[Tensor, " tokens"], correct: Bool[Tensor, " tokens"]) -> Float[Tensor, " bins"]:
    """Sum confidence minus correctness over the tokens of each bin, in float64.

        ECE = sum_m |gap_m| / n,   gap_m = sum of (p_i - c_i) over the tokens with (m - 1) / 15 < p_i <= m / 15

    p_i is the probability of the likeliest token at position i, c_i is 1 if this token is the target and else 0, and n
    is the number of tokens. A perfectly calibrated model has gaps of 0. Gaps of several batches are added. The tokens
    are those of the model's own tokenizer, so values of different tokenizers are about different predictions.

    Args:
        confidence: probabilities of the likeliest tokens.
        correct: whether these are the targets.

    Returns:
        The gap of each of the 15 bins; the bins of the largest probabilities are last.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599, section 2.

    Examples:
        >>> gaps = calibration_gaps(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))
        >>> gaps.sum().item()  # 1.5 correct predictions are expected, and there is one
        0.5
    """
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidence.double(), edges)
    return torch.bincount(bins, confidence.double() - correct.double(), minlength=NUM_BINS)
