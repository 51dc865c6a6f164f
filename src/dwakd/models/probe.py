"""The small batch on which models are checked before they are used, and how its results are compared."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.errors import UserError

_BEYOND = 1e6
_LENGTH = 16
_MIDDLE = 7  # a prime, at which few chunks of tokens end


class Probe:
    """Two batches of three sequences, of which each begins alike in both: whole, up to its middle and up to one token.

    The tokens are random, and distinct where the vocabulary allows it. Special tokens (padding, end of sequence, images)
    are left out, since some models treat them apart. The global random state is neither read nor changed.

    Args:
        config: of the model.
        vocab_size: number of tokens that the model can read and predict.
        device: of the model.
    """

    def __init__(self, config: Any, vocab_size: int, device: torch.device) -> None:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        length = min(_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _LENGTH
        self.kept = (length, max(1, length * _MIDDLE // _LENGTH), 1)
        """How many tokens of each sequence are the same in both batches."""
        ids = _plain_ids(vocab_size, _special_ids(config.to_dict()), 6 * length).view(2, 3, length)
        for row, count in enumerate(self.kept):
            ids[1, row, :count] = ids[0, row, :count]
        self.input_ids: Int[Tensor, "batch length"] = ids[0].to(device)
        self.changed_ids: Int[Tensor, "batch length"] = ids[1].to(device)


def _plain_ids(vocab_size: int, special: set[int], count: int) -> Int[Tensor, " tokens"]:
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    plain = [token for token in order if token not in special] or order
    return torch.tensor((plain * (count // len(plain) + 1))[:count])


def _special_ids(settings: dict[Any, Any]) -> set[int]:
    """Every token id that a config names, those of its parts included."""
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def relative_difference(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Root mean square of the difference, divided by that of `expected`; NaN if either holds a NaN.

    Values beyond a million are left out if they are beyond it in both: logits by which a head forbids tokens.
    """
    both_beyond = (found.abs() > _BEYOND) & (expected.abs() > _BEYOND)
    expected = expected.double().masked_fill(both_beyond, 0.0)
    difference = (found.double().masked_fill(both_beyond, 0.0) - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt().clamp_min(1e-30))


def head_tolerance(dtype: torch.dtype) -> float:
    """How far logits may be from the head's, relative to their size."""
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 3e-2)


def head_difference(ours: Float[Tensor, "tokens vocab"], expected: Float[Tensor, "tokens vocab"]) -> float:
    """The largest difference of two logits of one token, relative to the largest logit of that token of the vocabulary.

    Logits of -inf, by which a head forbids tokens, must agree. Each token of the vocabulary has its own scale, so that a
    huge negative bias on one hides no difference in another.
    """
    expected = expected.to(ours.dtype)
    difference = torch.where(ours == expected, 0.0, (ours - expected).abs())
    scale = expected.abs().masked_fill(expected.isinf(), 0.0).amax(0)
    return float((difference / (1 + scale)).max())


def check_causal(
    hidden: Float[Tensor, "batch length hidden"],
    changed: Float[Tensor, "batch length hidden"],
    kept: tuple[int, ...],
    name: str,
) -> None:
    """Refuse a model whose states depend on later tokens or on other sequences of the batch.

    Routing to experts rounds differently in other company. How much is measured on the first sequence, which is the same
    in both batches, and ten times as much is tolerated.

    Args:
        hidden: final hidden states of `Probe.input_ids`.
        changed: those of `Probe.changed_ids`.
        kept: of the probe.
        name: of the model.

    Raises:
        UserError: names the model.
    """
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3}.get(hidden.dtype, 8e-3)
    company, *ahead = [relative_difference(changed[row, :count], hidden[row, :count]) for row, count in enumerate(kept)]
    if not company <= 10 * rounding:
        raise UserError(
            f"{name} cannot be used: its hidden states of one sequence change with the other sequences of a batch (by "
            f"{company:.2g} of their size)"
        )
    if not max(ahead) <= max(rounding, 10 * company):
        raise UserError(
            f"{name} is not causal: its hidden states of earlier tokens change with later tokens (by {max(ahead):.2g} of "
            "their size), so that it would read the answer that it is to predict; give a decoder with causal attention "
            "(see is_decoder and is_causal in its config)"
        )
