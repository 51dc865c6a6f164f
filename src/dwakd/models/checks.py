"""Check before use that a model can be trained or be a teacher. Small batches of random tokens run through it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dwakd.batch import OutputHead
from dwakd.errors import UserError, explained
from dwakd.models.head import (
    attention_precision,
    causal_lm,
    embedding_table,
    evaluating,
    final_hidden,
    model_name,
    output_head,
    uses_flash_attention,
)
from dwakd.models.quantisation import is_quantised

_BEYOND = 1e6
"""Logits above this magnitude are treated as those of forbidden tokens."""
_LENGTH = 16
_MIDDLE = 7  # a prime number, so that chunked models rarely end a chunk here
_ROUNDING_BFLOAT16 = 8e-3
_LOSS_SETTINGS = {"output_router_logits": "false", "z_loss_coefficient": "0"}
"""Config settings that add a loss, and the values that turn it off."""


def check_head(model: nn.Module) -> None:
    """Raise an error if losses cannot be computed with a model.

    A small batch runs in eval mode and without gradient. The logits must equal
    `output_head(model).logits(final_hidden(model, ...))`, and the hidden states of a token must not depend on later tokens
    or on other sequences of the batch.

    Raises:
        UserError: a check or the model's forward pass failed. The message names the model and the problem.
    """
    name = model_name(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{name} has weights on the meta device (offloaded or not loaded); load the model into memory")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            f"{name} was partitioned while it was loaded; set zero3_init_flag: false in the accelerate config"
        )
    ids, changed_ids = _random_tokens(model)
    head, config = output_head(model).detached(), causal_lm(model).config
    if config.is_encoder_decoder or config.model_type == "reformer":  # Reformer's chunks are longer than the batches
        raise UserError(f"{name} is not causal: its architecture reads all tokens; use a decoder-only model")
    # The first sequence is the same in both batches, the second up to its middle, the third only in its first token.
    length = ids.shape[1]
    kept = (length, max(1, length * _MIDDLE // _LENGTH), 1)
    for row, count in enumerate(kept):
        changed_ids[row, :count] = ids[row, :count]
    mask = torch.ones_like(ids)
    devices = [] if ids.device.type == "cpu" else [ids.device]
    failure = explained(f"{name} cannot be used: its forward pass fails on token ids alone")
    fork = torch.random.fork_rng(devices, device_type=ids.device.type)
    with failure, evaluating(model), torch.no_grad(), fork, _eager_instead_of_flash(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hidden, changed = final_hidden(model, ids, mask), final_hidden(model, changed_ids, mask)
    rounding = _ROUNDING_BFLOAT16 if is_quantised(causal_lm(model)) else _rounding(hidden)
    if problem := _head_problem(logits, hidden, head) or _order_problem(hidden, changed, kept, rounding):
        raise UserError(f"{name} {problem}")


def check_training(model: Any, *, gradient_checkpointing: bool) -> None:
    """Raise an error if a student that passes `check_head` cannot be trained with the given options.

    Raises:
        UserError: the model does not support gradient checkpointing, or its config adds a loss that distillation would
            ignore.
    """
    name = model_name(model)
    supported = getattr(model, "supports_gradient_checkpointing", False)
    if gradient_checkpointing and not (
        supported and any(hasattr(module, "gradient_checkpointing") for module in model.modules())
    ):
        raise UserError(f"{name} does not support gradient checkpointing; set training.gradient_checkpointing=false")
    settings = model.config.get_text_config().to_dict()
    switches = [f"{setting}={off}" for setting, off in _LOSS_SETTINGS.items() if settings.get(setting)]
    added = _adds_loss(model)
    if added or (added is None and switches):
        raise UserError(
            f"{name} adds a loss (such as router balancing) to the cross-entropy of its tokens, which "
            f"distillation ignores; set {' and '.join(switches) or 'the coefficient of this loss to 0'} in its config"
        )


def check_packing(model: nn.Module) -> None:
    """Raise a UserError if rows that are packed into one sequence (`final_hidden`) depend on each other."""
    name, implementation = model_name(model), causal_lm(model).config.get_text_config()._attn_implementation
    ids = _random_tokens(model)[0].repeat(2, 1)
    counts = torch.tensor([_MIDDLE, 1, ids.shape[1], 2, 1, _MIDDLE], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < counts[:, None]).long()
    kept = mask.bool()
    fix = "set training.padding_free=false, or load it with another attn_implementation such as flash_attention_2"
    failure = explained(f"training.padding_free: {name} cannot run on packed rows; {fix}")
    with failure, evaluating(model), torch.no_grad(), attention_precision(model) as lower:
        alone, packed = (final_hidden(model, ids, mask, packed=packed)[kept] for packed in (False, True))
    difference = relative_difference(packed, alone)
    if not difference <= 10 * (_ROUNDING_BFLOAT16 if lower else _rounding(alone)):
        raise UserError(
            f"training.padding_free: with attention {implementation}, rows of {name} that are packed into one sequence "
            f"depend on each other (relative difference {difference:.2g}); {fix}"
        )


@contextlib.contextmanager
def _eager_instead_of_flash(model: nn.Module) -> Iterator[None]:
    """Replace flash attention, which runs neither on CPUs nor in float32, by attention that gives the same result."""
    config = causal_lm(model).config.get_text_config()
    saved = config._attn_implementation
    if uses_flash_attention(model):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = saved


def random_tokens(config: Any, vocab_size: int, device: torch.device) -> Int[Tensor, "2 3 length"]:
    """Return two batches of three sequences of random tokens, which are distinct if the vocabulary is large enough.

    Special tokens (padding, end of sequence, images) are left out because some models treat them differently. The global
    random state is neither read nor changed.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _LENGTH
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    special = _special_ids(config.to_dict())
    plain = [token for token in order if token not in special] or order
    return torch.tensor((plain * (6 * length // len(plain) + 1))[: 6 * length]).view(2, 3, length).to(device)


def relative_difference(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Compute the root mean square of the difference, divided by the root mean square of `expected`.

    Values whose magnitude exceeds a million in both tensors are ignored, because heads use such logits to forbid tokens.
    The result is NaN if a tensor contains NaN.
    """
    both_beyond = (found.abs() > _BEYOND) & (expected.abs() > _BEYOND)
    expected = expected.double().masked_fill(both_beyond, 0.0)
    difference = (found.double().masked_fill(both_beyond, 0.0) - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt().clamp_min(1e-30))


def _random_tokens(model: nn.Module) -> Int[Tensor, "2 3 length"]:
    """Return random tokens that the model can read and predict."""
    table = embedding_table(model)
    return random_tokens(causal_lm(model).config, min(len(table), output_head(model).vocab_size), table.device)


def _special_ids(settings: dict[Any, Any]) -> set[int]:
    """Collect the ids of all special tokens in a config, nested configs included."""
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def _head_problem(logits: Float[Tensor, "..."], hidden: Float[Tensor, "..."], head: OutputHead) -> str | None:
    """Describe a difference between a model's logits and those of its output head.

    Each vocab entry has its own scale (1 + its largest absolute logit), so that a very negative bias of one entry does
    not hide differences in others. Logits of -inf, which forbid tokens, must agree.
    """
    if hidden.shape[-1] != head.hidden_size or logits.shape != (*hidden.shape[:2], head.vocab_size):
        shapes = f"hidden states of shape {tuple(hidden.shape)} and logits of shape {tuple(logits.shape)}"
        return (
            f"cannot be used: its output head maps {head.hidden_size} values to {head.vocab_size}, but it has {shapes}"
        )
    if logits.isnan().any():
        return "cannot be used: its logits are NaN; check its weights"
    ours = head.logits(hidden.flatten(0, 1))
    expected = logits.flatten(0, 1).to(ours.dtype)
    differences = torch.where(ours == expected, 0.0, (ours - expected).abs())
    scale = expected.abs().masked_fill(expected.isinf(), 0.0).amax(0)
    difference = float((differences / (1 + scale)).max())
    if not difference <= {torch.float64: 1e-8, torch.float32: 1e-4}.get(head.weight.dtype, 3e-2):
        found = f"largest difference {difference:.3g}, relative to the logits"
        return f"has an unsupported architecture: its logits are not its output head applied to its hidden states ({found})"
    return None


def _order_problem(
    hidden: Float[Tensor, "3 length hidden"],
    changed: Float[Tensor, "3 length hidden"],
    kept: tuple[int, ...],
    rounding: float,
) -> str | None:
    """Describe a difference between the hidden states of the `kept` leading tokens of a batch and of a changed batch.

    In models with a mixture of experts, rounding depends on the other sequences. This effect is measured on the first
    sequence, which is the same in both batches, and a difference of ten times its size is allowed.
    """
    company, *ahead = [relative_difference(changed[row, :count], hidden[row, :count]) for row, count in enumerate(kept)]
    if not company <= 10 * rounding:
        found = f"relative difference {company:.2g}"
        return f"cannot be used: the hidden states of a sequence depend on the other sequences of a batch ({found})"
    if not max(ahead) <= max(rounding, 10 * company):
        found, fix = f"relative difference {max(ahead):.2g}", "check is_decoder and is_causal in its config"
        return f"is not causal: the hidden states of a token depend on later tokens ({found}); {fix}"
    return None


def _rounding(hidden: Tensor) -> float:
    """Return the relative difference that rounding may cause in hidden states of this dtype."""
    return {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3}.get(hidden.dtype, _ROUNDING_BFLOAT16)


def _adds_loss(model: nn.Module) -> bool | None:
    """Return whether a model's own loss differs from the cross-entropy of its tokens; None if it computes no loss."""
    ids = _random_tokens(model)[0]
    try:
        with evaluating(model), torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
        logits, loss = output.logits.float(), float(output.loss)
    except Exception:  # the code of a model may raise any exception
        return None
    # some models do not shift the labels: they compare each token with the logits of the same position
    plain = (
        float(nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()))
        for scores, targets in ((logits[:, :-1], ids[:, 1:]), (logits, ids))
    )
    tolerance = 1e-5 if output.loss.dtype in (torch.float32, torch.float64) else 1e-2
    return not any(abs(loss - value) <= tolerance * (1 + value) for value in plain)
