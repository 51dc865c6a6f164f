"""Check that a student can be trained, in addition to the checks of `dwakd.models.rows.check_head`."""

from typing import Any

import torch
from torch import nn

from dwakd.errors import UserError
from dwakd.models.head import embedding_table, model_name, output_head
from dwakd.models.probe import Probe
from dwakd.models.rows import evaluating

_LOSS_SETTINGS = {"output_router_logits": "false", "z_loss_coefficient": "0"}
"""Config settings that add a loss, and the values that turn it off."""


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
            f"{name} adds a loss of its own (such as router balancing) to the cross-entropy of its tokens, which "
            f"distillation ignores; set {' and '.join(switches) or 'the coefficient of this loss to 0'} in its config"
        )


def _adds_loss(model: nn.Module) -> bool | None:
    """Return whether a model's own loss differs from the cross-entropy of its tokens; None if it computes no loss."""
    table = embedding_table(model)
    ids = Probe(model.config, min(len(table), output_head(model).vocab_size), table.device).input_ids
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
