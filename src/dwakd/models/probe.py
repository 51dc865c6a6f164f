"""Create the small batches on which models are checked before use, and compare the results."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.batch import OutputHead
from dwakd.errors import UserError

_BEYOND = 1e6
"""Logits above this magnitude are treated as those of forbidden tokens."""
_LENGTH = 16
_MIDDLE = 7  # a prime number, so that chunked models rarely end a chunk here


class Probe:
    """Two batches of three sequences for testing a model.

    The first sequence is the same in both batches. The second is the same up to its middle, the third only in its first
    token. Tokens are random, and distinct if the vocabulary is large enough. Special tokens (padding, end of sequence,
    images) are left out because some models treat them differently. The global random state is neither read nor changed.

    Args:
        config: config of the model.
        vocab_size: number of tokens that the model can read and predict.
        device: device of the model.
    """

    def __init__(self, config: Any, vocab_size: int, device: torch.device) -> None:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        length = min(_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _LENGTH
        self.kept = (length, max(1, length * _MIDDLE // _LENGTH), 1)
        """Number of leading tokens of each sequence that are the same in both batches."""
        order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
        special = _special_ids(config.to_dict())
        plain = [token for token in order if token not in special] or order
        ids = torch.tensor((plain * (6 * length // len(plain) + 1))[: 6 * length]).view(2, 3, length)
        for row, count in enumerate(self.kept):
            ids[1, row, :count] = ids[0, row, :count]
        self.input_ids: Int[Tensor, "batch length"] = ids[0].to(device)
        self.changed_ids: Int[Tensor, "batch length"] = ids[1].to(device)


def _special_ids(settings: dict[Any, Any]) -> set[int]:
    """Collect the ids of all special tokens in a config, nested configs included."""
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def relative_difference(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Compute the root mean square of the difference, divided by the root mean square of `expected`.

    Values whose magnitude exceeds a million in both tensors are ignored, because heads use such logits to forbid tokens.
    The result is NaN if a tensor contains NaN.
    """
    both_beyond = (found.abs() > _BEYOND) & (expected.abs() > _BEYOND)
    expected = expected.double().masked_fill(both_beyond, 0.0)
    difference = (found.double().masked_fill(both_beyond, 0.0) - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt().clamp_min(1e-30))


def check_logits(logits: Float[Tensor, "..."], hidden: Float[Tensor, "..."], head: OutputHead, name: str) -> None:
    """Raise an error if a model's logits are not those of its output head.

    Each vocab entry has its own scale (1 + its largest absolute logit), so that a very negative bias of one entry does
    not hide differences in others. Logits of -inf, which forbid tokens, must agree.
    """
    if hidden.shape[-1] != head.hidden_size or logits.shape != (*hidden.shape[:2], head.vocab_size):
        raise UserError(
            f"{name} cannot be used: its output head maps {head.hidden_size} values to {head.vocab_size} logits, but its "
            f"hidden states have the shape {tuple(hidden.shape)} and its logits {tuple(logits.shape)}; use another model"
        )
    if logits.isnan().any():
        raise UserError(f"{name} cannot be used: its logits are NaN; check its weights")
    ours = head.logits(hidden.flatten(0, 1))
    expected = logits.flatten(0, 1).to(ours.dtype)
    differences = torch.where(ours == expected, 0.0, (ours - expected).abs())
    scale = expected.abs().masked_fill(expected.isinf(), 0.0).amax(0)
    difference = float((differences / (1 + scale)).max())
    if not difference <= {torch.float64: 1e-8, torch.float32: 1e-4}.get(head.weight.dtype, 3e-2):
        raise UserError(
            f"{name} cannot be used: its logits are not its output head applied to its final hidden states (largest "
            f"difference {difference:.3g}, relative to the logits), so its architecture is not supported; use another model"
        )


def check_causal(
    hidden: Float[Tensor, "batch length hidden"],
    changed: Float[Tensor, "batch length hidden"],
    kept: tuple[int, ...],
    name: str,
) -> None:
    """Raise an error if hidden states depend on later tokens or on other sequences of the batch.

    In models with a mixture of experts, rounding depends on the other sequences. This effect is measured on the first
    sequence, which is the same in both batches, and a difference of ten times its size is allowed.

    Args:
        hidden: final hidden states of `Probe.input_ids`.
        changed: final hidden states of `Probe.changed_ids`.
        kept: `Probe.kept`.
        name: name of the model for error messages.
    """
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3}.get(hidden.dtype, 8e-3)
    company, *ahead = [relative_difference(changed[row, :count], hidden[row, :count]) for row, count in enumerate(kept)]
    if not company <= 10 * rounding:
        raise UserError(
            f"{name} cannot be used: the hidden states of a sequence depend on the other sequences of a batch (relative "
            f"difference {company:.2g}); use a model that treats sequences independently"
        )
    if not max(ahead) <= max(rounding, 10 * company):
        raise UserError(
            f"{name} is not causal: hidden states of earlier tokens depend on later tokens (relative difference "
            f"{max(ahead):.2g}), so the model would see the tokens that it has to predict; use a decoder with causal "
            "attention (see is_decoder and is_causal in its config)"
        )
