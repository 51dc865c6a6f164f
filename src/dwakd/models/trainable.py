"""What a student must allow beside what `dwakd.models.rows.check_head` asks of every model."""

from typing import Any

import torch
from torch import nn

from dwakd.errors import UserError
from dwakd.models.probe import Probe
from dwakd.models.rows import embedding_table, evaluating, model_name, output_head

_LOSS_SETTINGS = {"output_router_logits": "false", "z_loss_coefficient": "0"}
"""Settings of a config that add a loss, and the values that switch it off."""


def check_training(model: Any, *, gradient_checkpointing: bool) -> None:
    """Refuse a student that cannot be trained as its config or the options ask.

    Args:
        model: a causal language model that `check_head` accepts.
        gradient_checkpointing: whether its layers are to be run again in the backward pass.

    Raises:
        UserError: the model has no gradient checkpointing, or adds a loss of its own, which would be left out.
    """
    if gradient_checkpointing and not _has_checkpointing(model):
        raise UserError(f"{model_name(model)} has no gradient checkpointing; set training.gradient_checkpointing=false")
    settings = model.config.get_text_config().to_dict()
    switches = [f"{name}={off}" for name, off in _LOSS_SETTINGS.items() if settings.get(name)]
    added = _adds_loss(model)
    if added or (added is None and switches):
        raise UserError(
            f"{model_name(model)} adds a loss of its own, such as router balancing, to the loss of its tokens, and "
            f"distillation would leave it out; set {' and '.join(switches) or 'its coefficient to 0'} in its config"
        )


def _has_checkpointing(model: Any) -> bool:
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    return any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def _adds_loss(model: nn.Module) -> bool | None:
    """Whether a model's own training loss is more than the cross-entropy of its tokens; None if it computes none."""
    table = embedding_table(model)
    ids = Probe(model.config, min(len(table), output_head(model).vocab_size), table.device).input_ids
    try:
        with evaluating(model), torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
        logits, loss = output.logits.float(), float(output.loss)
    except Exception:  # a model's own code may raise anything
        return None
    # some models compare each token with the logits of its own position
    plain = (
        float(nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()))
        for scores, targets in ((logits[:, :-1], ids[:, 1:]), (logits, ids))
    )
    tolerance = 1e-5 if output.loss.dtype in (torch.float32, torch.float64) else 1e-2
    return not any(abs(loss - value) <= tolerance * (1 + value) for value in plain)
