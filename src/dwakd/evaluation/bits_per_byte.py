"""Bits per byte: a likelihood that can be compared between models with different tokenizers."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class BitsPerByte:
    """Likelihood of the responses given their prompts, over a whole set: long responses have more weight."""

    value: float
    """bits / bytes"""
    bits: float
    """Minus log2 of the probability of all response tokens, including the end-of-sequence tokens."""
    bytes: int
    """UTF-8 bytes of the responses; an end-of-sequence token has none."""
    num_examples: int
    num_truncated: int
    """Responses that were cut. Two tokenizers cut at different places: compare their values only if both are 0."""


def bits_per_byte(
    model: Model,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> BitsPerByte | None:
    """Compute the bits of every response, given its prompt, per UTF-8 byte of the responses.

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
    answered = [example for example in examples if example.response.strip()]
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
    bits, num_bytes = 0.0, 0
    loader = DataLoader(alike, batch_size=batch_size, collate_fn=collate)
    with evaluating(model), torch.no_grad(), progress_bar(disable=not progress) as bar:
        for batch in bar.track(loader, description="bits per byte"):
            side = response_side(model, batch.to(model.device).student)
            bits += _bits(side)
            num_bytes += int(side.byte_ends[side.lengths.cumsum(0) - 1].sum())  # the ends of the last tokens
    return BitsPerByte(bits / num_bytes, bits, num_bytes, len(pairs), pairs.num_truncated)


def _bits(side: ModelSide) -> float:
    """Sum the bits of all target tokens in float64."""
    rows = max(1, LOGITS_AT_ONCE // side.head.vocab_size)
    nats = 0.0
    for hidden, targets in zip(torch.split(side.hidden, rows), torch.split(side.target_ids, rows), strict=True):
        losses = torch.nn.functional.cross_entropy(side.head.logits(hidden), targets, reduction="none")
        nats += losses.cpu().double().sum().item()
    return nats / math.log(2)
