"""Access the output head, the embedding table and the backbone of a model, inside a PEFT wrapper or not."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from dwakd.batch import OutputHead
from dwakd.errors import UserError
from dwakd.models.quantisation import quantised_weight

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

    A table adapted by LoRA or trainable tokens, which change embeddings without changing the table, is refused. A sharded
    table is `gathered`.
    """
    return gathered(_plain_module("get_input_embeddings", "input embeddings", model).weight)


def num_embeddings(model: nn.Module) -> int:
    """Return the number of rows of a model's input-embedding table, without gathering one that is sharded."""
    weight = causal_lm(model).get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def output_head(model: nn.Module) -> OutputHead:
    """Return the model's LM head with the bias, scale and soft cap of its architecture; refuse one adapted by LoRA.

    A sharded head is `gathered`.
    """
    module = _plain_module("get_output_embeddings", "output head", model)
    return _output_head(model, gathered(module.weight), getattr(module, "bias", None))


def table_and_head(model: nn.Module) -> tuple[Float[Tensor, "vocab embedding"], OutputHead]:
    """Return the input-embedding table and the LM head. A sharded matrix that both of them use is gathered only once."""
    table = _plain_module("get_input_embeddings", "input embeddings", model).weight
    module = _plain_module("get_output_embeddings", "output head", model)
    weight = gathered(module.weight)
    head = _output_head(model, weight, getattr(module, "bias", None))
    return (weight if table is module.weight else gathered(table)), head


def gathered(parameter: Tensor) -> Tensor:
    """Return a parameter as one full tensor; if FSDP2 or ZeRO-3 shards it, all processes have to call this function.

    The gradient that reaches the shards is the mean over the processes, as for parameters that FSDP itself gathers. The
    full tensor exists as long as the caller or autograd refers to it.
    """
    if hasattr(parameter, "ds_id") and parameter.shape != parameter.ds_shape:  # type: ignore[attr-defined]
        return _gathered_by_deepspeed(parameter)
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    full: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return full


def _gathered_by_deepspeed(parameter: Any) -> Tensor:
    """Return a parameter that ZeRO-3 has partitioned and does not gather itself, for example outside a forward pass."""
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([parameter]):
        full: Tensor = parameter.view_as(parameter)  # DeepSpeed empties the parameter; the view keeps the values
    if full.requires_grad:
        stack = contextlib.ExitStack()

        def release(_: Any) -> None:
            stack.close()
            handle.remove()

        # autograd adds the gradient to a parameter of the same shape only
        full.register_hook(lambda _: stack.enter_context(GatheredParameters([parameter])) and None)  # type: ignore[no-untyped-call]
        handle = parameter.register_post_accumulate_grad_hook(release)
    return full


def _output_head(model: nn.Module, weight: Tensor, bias: Tensor | None) -> OutputHead:
    config = causal_lm(model).config.get_text_config()
    caps = [float(cap) for field in _SOFT_CAPS if (cap := getattr(config, field, None)) is not None]
    scales = [
        float(value) ** power
        for prefix, field, power in _LOGIT_SCALES
        if config.model_type.startswith(prefix) and (value := getattr(config, field, None)) is not None
    ]
    bias = None if bias is None else gathered(bias)
    return OutputHead(weight, bias, scales[0] if scales else 1.0, caps[0] if caps else None)


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


def uses_flash_attention(model: nn.Module) -> bool:
    """Return whether a model computes attention by a function that requires float16 or bfloat16, and usually a GPU."""
    return "flash" in str(causal_lm(model).config.get_text_config()._attn_implementation)


@contextlib.contextmanager
def attention_precision(model: nn.Module) -> Iterator[bool]:
    """Run a float32 model with flash attention under bfloat16 autocast, unless the caller uses autocast already.

    The value of the context is whether it changes the precision.
    """
    first = next(model.parameters())
    device = first.device.type
    needed = uses_flash_attention(model) and first.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    with torch.autocast(device, torch.bfloat16) if needed else contextlib.nullcontext():
        yield needed


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
    kept = attention_mask.bool()
    if packed:
        positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)[kept]
        inputs = {"input_ids": input_ids[kept][None], "position_ids": positions[None]}
    else:
        # Causal attention needs no mask for right padding. Positions whose keys are all masked would be NaN in eager float64.
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(attention_mask)}
    run = partial(_run_backbone, model, backbone, inputs, kept if packed else None)
    owner: Any = next((module for module in (model, lm) if hasattr(module, "set_requires_gradient_sync")), None)
    if owner is None:
        hidden: Tensor = run()
        return hidden
    # FSDP2 gathers what belongs to no layer, such as the embeddings, in the hooks of the model's forward
    from torch.distributed.fsdp import register_fsdp_forward_method

    owner.run_backbone = run
    register_fsdp_forward_method(owner, "run_backbone")
    hidden = owner.run_backbone()
    del owner.run_backbone
    return hidden


def _run_backbone(model: nn.Module, backbone: Any, inputs: dict[str, Tensor], packed: Tensor | None) -> Any:
    """Run a model without its head. Rows that are packed are written to the positions of a mask."""
    with attention_precision(model):
        found = backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    if packed is None:
        return found
    return found.new_zeros(*packed.shape, found.shape[-1]).masked_scatter(packed[..., None], found)


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
    if quantised_weight(module):
        fix = "leave it out of the quantisation, or give the model by name, so that it is dequantised"
        raise UserError(f"the {what} of {model_name(model)} is quantised; {fix}")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or len(getattr(weight, "ds_shape", weight.shape)) != 2:
        raise UserError(f"{model_name(model)} cannot be used: {getter}() returns no matrix for its {what}")
    return module
