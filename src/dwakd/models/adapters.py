"""Merge a PEFT adapter into the weights of its model and verify that the logits stay the same."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dwakd.errors import UserError
from dwakd.models.checks import random_tokens, relative_difference

_TRAINED_TOKENS = 8
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2}
"""Largest relative difference between merged and unmerged logits that rounding explains, by dtype. Others: 0.1."""


def merge_adapter(adapted: PeftModel, name: str) -> Any:
    """Merge an adapter into the weights of its model, in place, and return the model in eval mode, without PEFT layers.

    If input embeddings and output head share one matrix and the adapter changes only one of them, the head first gets
    its own copy of the matrix. The logits of a few tokens are compared before and after merging; an adapter that cannot
    be merged or changes them is refused. `name` is the name of the adapter in messages.
    """
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise UserError(f"adapter {name} is of type {kind}, which cannot be merged into weights; use LoRA, for example")
    adapted.eval()
    lm = adapted.get_base_model()
    head = _plain(lm.get_output_embeddings())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in (lm.config, lm.config.get_text_config()))
    if tied and any(weight is head.weight for _, _, weight in _conflicts(adapted)):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        _declare_untied(lm)
    for changed, other, _ in _conflicts(adapted):
        fix = f"train the adapter without {changed} in target_modules"
        raise UserError(f"adapter {name} cannot be merged: {changed} shares its weight with {other}; {fix}")
    layers = [_short(path) for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    input_ids = _input_ids(adapted)
    expected = _logits(adapted, input_ids)
    model = adapted.merge_and_unload()
    if model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        _declare_untied(model)
    difference = relative_difference(_logits(model, input_ids), expected)
    if not difference <= _TOLERANCES.get(model.dtype, 1e-1):
        fix = f"use an adapter of other modules than {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}"
        raise UserError(
            f"adapter {name} cannot be merged: the logits change (relative difference {difference:.2g}); {fix}"
        )
    return model


def _conflicts(adapted: PeftModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Find shared weights for which merging would also change a module that the adapter does not change.

    Yields the path of the module that the adapter changes, the path of the other module, and the weight.
    """
    users: dict[nn.Parameter, dict[nn.Module | None, str]] = {}
    layers: dict[str, tuple[str, nn.Module] | None] = {}
    for path, module in adapted.named_modules(remove_duplicate=False):
        layer = layers.get(path.rpartition(".")[0])
        if layer is None and isinstance(module, BaseTunerLayer):
            layer = path, getattr(module, "tied_adapter", None) or module
        layers[path] = layer
        if layer is not None and not path.startswith(f"{layer[0]}.base_layer"):
            continue  # weights of the adapter itself
        for weight in module._parameters.values():
            if weight is not None:
                users.setdefault(weight, {}).setdefault(None if layer is None else layer[1], _short(path))
    for weight, found in users.items():
        changed = [path for layer, path in found.items() if layer is not None]
        if changed and len(found) > 1:
            yield changed[0], next(path for path in found.values() if path != changed[0]), weight


def _short(path: str) -> str:
    """Return the path of a module in the base model, without the parts that PEFT adds."""
    parts = path.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "token_adapter", "original_module"))


def _plain(module: Any) -> Any:
    """Return the module of the base model inside PEFT's wrappers."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _declare_untied(lm: Any) -> None:
    """Set tie_word_embeddings to false, because loading the saved model would otherwise tie the two matrices again."""
    for config in (lm.config, lm.config.get_text_config()):
        config.tie_word_embeddings = False


def _input_ids(adapted: PeftModel) -> Int[Tensor, "1 length"]:
    """Return random tokens, the first ones replaced by tokens whose embeddings the adapter has trained."""
    lm = adapted.get_base_model()
    weight = _plain(lm.get_input_embeddings()).weight
    ids = random_tokens(lm.config, len(weight), weight.device)[0, :1]
    layers = [module for module in adapted.modules() if isinstance(module, TrainableTokensLayer)]
    groups = [tokens[:_TRAINED_TOKENS] for layer in layers for tokens in layer.token_indices.values()]
    trained = ids.new_tensor([token for tokens in groups for token in tokens])[: ids.shape[1]]
    ids[0, : len(trained)] = trained
    return ids


@torch.no_grad()
def _logits(model: Any, input_ids: Int[Tensor, "1 length"]) -> Any:
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
