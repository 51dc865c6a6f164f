"""Merge a PEFT adapter into the weights of its model, and make sure that the model still computes the same."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from dwakd.errors import UserError
from dwakd.models.probe import Probe, relative_difference

_TRAINED_TOKENS = 8
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2}
"""How far merged logits may be from unmerged ones by rounding, relative to their size; 0.1 in bfloat16."""


def merge_adapter(adapted: PeftModel, name: str) -> Any:
    """Merge an adapter into its model, in eval mode and without a second copy of the model.

    A matrix that input embeddings and output head share is separated first if the adapter changes it for one of them.
    The logits of a few tokens are compared before and after.

    Args:
        adapted: the model with its adapter; it cannot be used any more.
        name: of the adapter.

    Raises:
        UserError: the adapter cannot be merged, or the merged model would compute something else.
    """
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise UserError(f"the adapter {name} ({kind}) has nothing to merge into weights; use LoRA, for example")
    adapted.eval()
    lm = adapted.get_base_model()
    head = _plain(lm.get_output_embeddings())
    if any(shared.weight is head.weight for shared in _conflicts(adapted)) and _says_tied(lm):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        _declare_untied(lm)
    if conflict := next(_conflicts(adapted), None):
        raise UserError(
            f"the adapter {name} cannot be merged: it changes {conflict.changed}, whose weights are also those of "
            f"{conflict.other}, which it does not change alike; leave {conflict.changed} out of its target_modules"
        )
    layers = [_short(path) for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    input_ids = _input_ids(adapted)
    expected = _logits(adapted, input_ids)
    model = adapted.merge_and_unload()
    if model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        _declare_untied(model)
    difference = relative_difference(_logits(model, input_ids), expected)
    if not difference <= _TOLERANCES.get(model.dtype, 1e-1):
        raise UserError(
            f"the adapter {name} cannot be merged: the logits of the merged model differ from those of model and adapter "
            f"by {difference:.2g} of their size; it changes {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}"
        )
    return model


class _Conflict(NamedTuple):
    changed: str
    """Path of a module that the adapter changes."""
    other: str
    """Path of a module that uses the same weight without that change."""
    weight: nn.Parameter


def _conflicts(adapted: PeftModel) -> Iterator[_Conflict]:
    """Weights that an adapter would change for a module beside the one that it adapts."""
    users: dict[nn.Parameter, dict[nn.Module | None, str]] = {}
    layers: dict[str, tuple[str, nn.Module] | None] = {}
    for path, module in adapted.named_modules(remove_duplicate=False):
        layer = layers.get(path.rpartition(".")[0])
        if layer is None and isinstance(module, BaseTunerLayer):
            layer = path, getattr(module, "tied_adapter", None) or module
        layers[path] = layer
        if layer is not None and not path.startswith(f"{layer[0]}.base_layer"):
            continue  # the adapter's own weights
        for weight in module._parameters.values():
            if weight is not None:
                users.setdefault(weight, {}).setdefault(None if layer is None else layer[1], _short(path))
    for weight, found in users.items():
        changed = [path for layer, path in found.items() if layer is not None]
        if changed and len(found) > 1:
            yield _Conflict(changed[0], next(path for path in found.values() if path != changed[0]), weight)


def _short(path: str) -> str:
    """The path of a module as the model itself has it."""
    parts = path.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "token_adapter", "original_module"))


def _plain(module: Any) -> Any:
    """The module of the base model inside PEFT's wrappers."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _plain(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _says_tied(lm: Any) -> bool:
    return any(getattr(config, "tie_word_embeddings", False) for config in (lm.config, lm.config.get_text_config()))


def _declare_untied(lm: Any) -> None:
    """Otherwise the two matrices would become one when the saved model is loaded."""
    for config in (lm.config, lm.config.get_text_config()):
        config.tie_word_embeddings = False


def _input_ids(adapted: PeftModel) -> Int[Tensor, "1 length"]:
    """Random tokens, and some of those whose embeddings the adapter trained."""
    lm = adapted.get_base_model()
    weight = _plain(lm.get_input_embeddings()).weight
    ids = Probe(lm.config, len(weight), weight.device).input_ids[:1]
    trained = [
        token
        for module in adapted.modules()
        if isinstance(module, TrainableTokensLayer)
        for tokens in module.token_indices.values()
        for token in tokens[:_TRAINED_TOKENS]
    ]
    ids[0, : len(trained)] = ids.new_tensor(trained)[: ids.shape[1]]
    return ids


@torch.no_grad()
def _logits(model: nn.Module, input_ids: Int[Tensor, "1 length"]) -> Float[Tensor, "1 length vocab"]:
    logits: Tensor = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    return logits
