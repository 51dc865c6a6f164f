"""Run a model on a batch and select the response positions that a loss reads (`ModelSide`).

Only the backbone runs over the whole batch. No product with the vocabulary is computed here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.errors import UserError
from dwakd.models.attention import last_layer
from dwakd.models.probe import Probe, check_causal, check_logits

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

    Raises:
        UserError: the table is adapted by LoRA or trainable tokens, which change embeddings without changing the table.
    """
    table: Tensor = _plain_module("get_input_embeddings", "input embeddings", model).weight
    return table


def output_head(model: nn.Module) -> OutputHead:
    """Return the model's LM head with the bias, scale and soft cap of its architecture, all with gradient.

    Raises:
        UserError: the model has no head, or the head is adapted by LoRA.
    """
    module = _plain_module("get_output_embeddings", "output head", model)
    config = _causal_lm(model).config.get_text_config()
    cap = next((cap for cap in (getattr(config, field, None) for field in _SOFT_CAPS) if cap is not None), None)
    return OutputHead(
        weight=module.weight,
        bias=getattr(module, "bias", None),
        scale=_logit_scale(config),
        soft_cap=None if cap is None else float(cap),
    )


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
    table, head = embedding_table(model), output_head(model)
    config = _causal_lm(model).config
    reads_ahead = {
        "it is an encoder-decoder, whose encoder reads all tokens": config.is_encoder_decoder,
        # the probe's sequences are too short to show it
        "Reformer's hashed attention sorts all tokens of a sequence": config.model_type == "reformer",
    }
    for reason, holds in reads_ahead.items():
        if holds:
            raise UserError(f"{name} is not causal: {reason}; use a decoder-only model")
    probe = Probe(config, min(len(table), head.vocab_size), table.device)
    logits, hidden, changed = _probed(model, probe)
    check_logits(logits, hidden, head.detached(), name)
    check_causal(hidden, changed, probe.kept, name)


def _probed(model: nn.Module, probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and final hidden states of the probe, and final hidden states of its changed batch."""
    mask, device = torch.ones_like(probe.input_ids), probe.input_ids.device
    devices = [] if device.type == "cpu" else [device]
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        try:
            logits = model(input_ids=probe.input_ids, attention_mask=mask, use_cache=False).logits
            return logits, final_hidden(model, probe.input_ids, mask), final_hidden(model, probe.changed_ids, mask)
        except UserError:
            raise
        except Exception as error:  # the code of a model may raise any exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(
                f"{model_name(model)} cannot be used: its forward pass fails on token ids alone ({reason}); correct the "
                "cause or use another model"
            ) from error


def final_hidden(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length hidden"]:
    """Compute the final hidden states that the output head reads (after the final norm, and after OPT's projection).

    A PEFT adapter stays active, and the model's train or eval mode is kept. The result has gradient. Values at padding,
    which is on the right, are arbitrary.

    Raises:
        UserError: the model has no backbone that can run without the head.
    """
    lm = _causal_lm(model)
    # the base_model_prefix of Llama 4 is not the name of a module, so base_model returns the whole model
    backbone = lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)
    if backbone is lm:
        raise UserError(
            f"{model_name(model)} cannot be used: it has no backbone that runs without the output head; use another model"
        )
    # Causal attention needs no mask for right padding. Positions whose keys are all masked would be NaN in eager float64.
    seen = torch.ones_like(attention_mask)
    output = backbone(input_ids=input_ids, attention_mask=seen, use_cache=False, return_dict=True)
    hidden: Tensor = output.last_hidden_state
    return hidden


def final_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
    *,
    attention: bool,
) -> tuple[Float[Tensor, "batch length hidden"], Float[Tensor, "batch length"] | None]:
    """Compute `final_hidden` and, if `attention` is true, `ModelSide.attention` of every position (otherwise None)."""
    if not attention:
        return final_hidden(model, input_ids, attention_mask), None
    with last_layer(_causal_lm(model).config.get_text_config()) as recorded:
        hidden = final_hidden(model, input_ids, attention_mask)
    return hidden, recorded.row(attention_mask.sum(1) - 1)


def response_side(model: nn.Module, tokens: TokenBatch, *, attention: bool = False) -> ModelSide:
    """Run a model that is trained, and select the response positions of the batch.

    Gradient reaches the model through `hidden`, `target_embeddings` and `head`. With `attention`, the side has attention.
    """
    hidden, weights = final_states(model, tokens.input_ids, tokens.attention_mask, attention=attention)
    places = response_places(tokens)
    weights = None if weights is None else weights.flatten()[places]
    return select_side(tokens, hidden.flatten(0, 1)[places], weights, embedding_table(model), output_head(model))


def select_side(
    tokens: TokenBatch,
    hidden: Float[Tensor, "tokens hidden"],
    attention: Float[Tensor, " tokens"] | None,
    table: Float[Tensor, "vocab embedding"],
    head: OutputHead,
) -> ModelSide:
    """Combine the hidden states and the attention of the response positions with their tokens.

    `table` is the model's input-embedding table. Table and head are detached for a teacher.
    """
    places = response_places(tokens)
    targets = tokens.target_ids.flatten()[places]
    return ModelSide(
        hidden=hidden,
        input_embeddings=table.detach()[tokens.input_ids.flatten()[places]],
        target_embeddings=nn.functional.embedding(targets, table),
        target_ids=targets,
        lengths=tokens.response_mask.sum(dim=1),
        byte_ends=tokens.byte_ends.flatten()[places],
        head=head,
        aligned_rows=tokens.aligned_rows,
        attention=attention,
        num_rows=tokens.num_rows,
    )


def response_places(tokens: TokenBatch) -> Int[Tensor, " tokens"]:
    """Return the indices of the response positions in the flattened batch, without waiting for the device."""
    return tokens.response_mask.flatten().logical_not().byte().argsort(stable=True)[: sum(tokens.num_rows)]


def model_name(model: nn.Module) -> str:
    """Return the name of a model for messages: the name or folder it was loaded from, or the name of its class."""
    lm = _causal_lm(model)
    return str(getattr(getattr(lm, "config", None), "_name_or_path", "") or type(lm).__name__)


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


def _causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside a PEFT wrapper, whose adapter stays active, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UserError(
            "PEFT methods that prepend learned prompts are not supported; use LoRA or another method that changes layers"
        )
    return model.get_base_model()


def _plain_module(getter: str, what: str, model: nn.Module) -> Any:
    """Return the module that holds the matrix in use. If PEFT trains a copy (modules_to_save), this is the copy."""
    try:
        module = getattr(_causal_lm(model), getter)()
    except (AttributeError, NotImplementedError):
        module = None
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UserError(
            f"a PEFT adapter changes the {what} of {model_name(model)} without changing the weight matrix; remove the module "
            "from target_modules, or train the full matrix with modules_to_save"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(
            f"{model_name(model)} cannot be used: {getter}() returns no matrix for its {what}; use another model"
        )
    return module


def _logit_scale(config: Any) -> float:
    """Return the factor by which the model's architecture multiplies its logits."""
    for prefix, field, power in _LOGIT_SCALES:
        value = getattr(config, field, None)
        if config.model_type.startswith(prefix) and value is not None:
            return float(value) ** power
    return 1.0
