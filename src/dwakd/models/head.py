"""Access the output head, the embedding table and the backbone of a model, inside a PEFT wrapper or not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from dwakd.batch import OutputHead
from dwakd.errors import UserError

# Prefix of the model type, config field, exponent: logits are multiplied by the field to the power of the exponent.
_LOGIT_SCALES = (
    ("cohere", "logit_scale", 1),
    ("falcon_h1", "lm_head_multiplier", 1),
    ("granite", "logits_scaling", -1),
    ("hyperclovax", "logits_scaling", 1),
    ("inkling", "logits_mup_width_multiplier", -1),
    ("minicpm3", "logits_scaling", -1),
    ("muse_", "output_multiplier", 1),
)
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def embedding_table(model: nn.Module) -> Float[Tensor, "vocab embedding"]:
    """Return the input-embedding table, without Gemma's scaling by sqrt(hidden) and without position embeddings.

    A table adapted by LoRA or trainable tokens, which change embeddings without changing the table, is refused.
    """
    table: Tensor = _plain_module("get_input_embeddings", "input embeddings", model).weight
    return table


def output_head(model: nn.Module) -> OutputHead:
    """Return the model's LM head with the bias, scale and soft cap of its architecture; refuse one adapted by LoRA."""
    module = _plain_module("get_output_embeddings", "output head", model)
    config = causal_lm(model).config.get_text_config()
    caps = [float(cap) for field in _SOFT_CAPS if (cap := getattr(config, field, None)) is not None]
    scales = [
        float(value) ** power
        for prefix, field, power in _LOGIT_SCALES
        if config.model_type.startswith(prefix) and (value := getattr(config, field, None)) is not None
    ]
    bias = getattr(module, "bias", None)
    return OutputHead(module.weight, bias, scales[0] if scales else 1.0, caps[0] if caps else None)


def model_name(model: nn.Module) -> str:
    """Return the name of a model for messages: the name or folder it was loaded from, or the name of its class."""
    lm = causal_lm(model)
    return str(getattr(getattr(lm, "config", None), "_name_or_path", "") or type(lm).__name__)


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT wrapper, whose adapter stays active, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UserError("PEFT methods that prepend learned prompts are not supported; use a method such as LoRA")
    return model.get_base_model()


def final_hidden(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
    *,
    packed: bool = False,
) -> Float[Tensor, "batch length hidden"]:
    """Compute the final hidden states that the output head reads (after the final norm, and after OPT's projection).

    A PEFT adapter stays active, and the model's train or eval mode is kept. The result has gradient. Values at padding,
    which is on the right, are arbitrary.

    With `packed`, the model runs on one sequence without padding. Position ids that start again at 0 separate the rows,
    which not every model observes (`check_packing`).
    """
    lm = causal_lm(model)
    # the base_model_prefix of Llama 4 is not the name of a module, so base_model returns the whole model
    backbone = lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)
    if backbone is lm:
        raise UserError(f"{model_name(model)} cannot be used: it has no backbone that runs without the output head")
    if packed:
        kept = attention_mask.bool()
        positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)[kept]
        output = backbone(
            input_ids=input_ids[kept][None], position_ids=positions[None], use_cache=False, return_dict=True
        )
        found: Tensor = output.last_hidden_state[0]
        return found.new_zeros(*kept.shape, found.shape[1]).masked_scatter(kept[..., None], found)
    # Causal attention needs no mask for right padding. Positions whose keys are all masked would be NaN in eager float64.
    seen = torch.ones_like(attention_mask)
    output = backbone(input_ids=input_ids, attention_mask=seen, use_cache=False, return_dict=True)
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside a `with` block. Afterwards every submodule gets its previous mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _plain_module(getter: str, what: str, model: nn.Module) -> Any:
    """Return the module that holds the matrix in use. If PEFT trains a copy (modules_to_save), this is the copy."""
    try:
        module = getattr(causal_lm(model), getter)()
    except (AttributeError, NotImplementedError):
        module = None
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        fix = "remove the module from target_modules, or train the full matrix with modules_to_save"
        raise UserError(f"a PEFT adapter changes the {what} of {model_name(model)} without changing the matrix; {fix}")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(f"{model_name(model)} cannot be used: {getter}() returns no matrix for its {what}")
    return module
