"""From a model and a batch to the response rows that a loss reads (`ModelSide`).

Only the backbone runs over the whole batch; no vocabulary-sized product is formed here.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from dwakd.batch import ModelSide
from dwakd.errors import UserError
from dwakd.models.attention import last_layer
from dwakd.models.head import OutputHead
from dwakd.models.probe import Probe, check_causal, head_difference, head_tolerance

# Prefix of the model type, config field, power to which the field multiplies the logits.
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
    """The input-embedding table as it stands: without Gemma's scaling by sqrt(hidden), without positions.

    Raises:
        UserError: the table is under LoRA or trainable tokens, which change rows outside the table.
    """
    table: Tensor = _plain_module("get_input_embeddings", "input embeddings", model).weight
    return table


def output_head(model: nn.Module) -> OutputHead:
    """The model's LM head with the bias, scale and soft cap of its architecture; gradient flows into the weight.

    Raises:
        UserError: the model has no head, or LoRA on it.
    """
    module = _plain_module("get_output_embeddings", "output head", model)
    config = _causal_lm(model).config.get_text_config()
    caps = [cap for cap in (getattr(config, field, None) for field in _SOFT_CAPS) if cap is not None]
    return OutputHead(
        weight=module.weight,
        bias=getattr(module, "bias", None),
        scale=_logit_scale(config),
        soft_cap=float(caps[0]) if caps else None,
    )


def check_head(model: nn.Module) -> None:
    """Refuse a model that losses cannot use.

    Runs a small batch in eval mode and without gradient. The logits must be `output_head(model).logits(final_hidden(model,
    ...))`, and the states of a token may change neither with later tokens nor with other sequences of the batch.

    Raises:
        UserError: names the model and what is wrong with it; also if its own forward pass fails.
    """
    name = model_name(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{name} has weights on the meta device (offloaded, or never loaded); load it into memory")
    table, head = embedding_table(model), output_head(model)
    config = _causal_lm(model).config
    if config.is_encoder_decoder:
        raise UserError(
            f"{name} is not causal: the encoder of an encoder-decoder reads all tokens; give a decoder alone"
        )
    if config.model_type == "reformer":  # sequences longer than the probe's are needed to see it
        raise UserError(f"{name} is not causal: Reformer's hashed attention sorts all tokens of a sequence together")
    probe = Probe(config, min(len(table), head.vocab_size), table.device)
    logits, hidden, changed = _probed(model, probe)
    if hidden.shape[-1] != head.hidden_size or logits.shape != (*hidden.shape[:2], head.vocab_size):
        raise UserError(
            f"{name} cannot be used: its head maps {head.hidden_size} to {head.vocab_size}, but its hidden states have "
            f"the shape {tuple(hidden.shape)} and its logits {tuple(logits.shape)}"
        )
    if logits.isnan().any():
        raise UserError(f"{name} cannot be used: its logits are NaN; check its weights")
    difference = head_difference(head.detached().logits(hidden.flatten(0, 1)), logits.flatten(0, 1))
    if not difference <= head_tolerance(head.weight.dtype):
        raise UserError(
            f"{name} cannot be used: its logits are not its output head applied to its final hidden states (largest "
            f"difference {difference:.3g} of their size); its architecture does more than is known here"
        )
    check_causal(hidden, changed, probe.kept, name)


def _probed(model: nn.Module, probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and final hidden states of the probe, and final hidden states of its changed batch."""
    mask, device = torch.ones_like(probe.input_ids), probe.input_ids.device
    devices = [] if device.type == "cpu" else [device]
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        try:
            logits = model(input_ids=probe.input_ids, attention_mask=mask, use_cache=False).logits
            return logits, final_hidden(model, probe.input_ids, mask), final_hidden(model, probe.changed_ids, mask)
        except UserError:
            raise
        except Exception as error:  # a model's own code may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(
                f"{model_name(model)} cannot be used: its forward pass on token ids alone fails ({reason})"
            ) from error


def final_hidden(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length hidden"]:
    """Final hidden states, the ones that the head reads (after the final norm, and OPT's projection).

    Args:
        model: a causal LM, bare or wrapped by PEFT (whose layers stay active); train or eval mode is left as it is.
        input_ids: right-padded.
        attention_mask: 1 for tokens, 0 for padding.

    Returns:
        One row per position, with gradient; rows of padding are arbitrary.
    """
    lm = _causal_lm(model)
    backbone = (
        lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)
    )  # Llama 4's prefix names no module
    if backbone is lm:
        raise UserError(f"{model_name(model)} cannot be used: it has no backbone apart from its head")
    # Right padding needs no mask under causal attention, and rows of nothing but masked keys are NaN in eager float64.
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
    """`final_hidden` and, if asked for, `ModelSide.attention` of every position."""
    if not attention:
        return final_hidden(model, input_ids, attention_mask), None
    with last_layer(_causal_lm(model).config.get_text_config()) as noted:
        hidden = final_hidden(model, input_ids, attention_mask)
    return hidden, noted.row(attention_mask.sum(1) - 1)


def response_rows(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"],
    target_ids: Int[Tensor, "batch length"],
    response_mask: Bool[Tensor, "batch length"],
    byte_ends: Int[Tensor, "batch length"],
    *,
    attention: bool = False,
    num_rows: Sequence[int] | None = None,
) -> ModelSide:
    """Run the backbone and keep the rows where `response_mask` is True, in the order of the batch.

    Gradient reaches the model through `hidden` and through `target_embeddings`, which are rows of the embedding
    table itself; `input_embeddings` are constants.

    Args:
        model: as in `final_hidden`.
        input_ids: the tokens read, right-padded.
        attention_mask: 1 for tokens, 0 for padding.
        target_ids: the token predicted at each position.
        response_mask: True where the predicted token is a supervised token of the response.
        byte_ends: byte offset in the response at which the predicted token ends.
        attention: give the attention too.
        num_rows: of each example, how often its mask is True; without it the device is waited for.
    """
    hidden, weights = final_states(model, input_ids, attention_mask, attention=attention)
    table = embedding_table(model)
    rows = true_places(response_mask, num_rows)
    targets = target_ids.flatten()[rows]
    return ModelSide(
        hidden=hidden.flatten(0, 1)[rows],
        input_embeddings=table.detach()[input_ids.flatten()[rows]],
        target_embeddings=nn.functional.embedding(targets, table),
        target_ids=targets,
        lengths=response_mask.sum(dim=1),
        byte_ends=byte_ends.flatten()[rows],
        head=output_head(model),
        attention=None if weights is None else weights.flatten()[rows],
    ).with_counts(num_rows)


def true_places(mask: Bool[Tensor, "batch length"], counts: Sequence[int] | None) -> Int[Tensor, " tokens"]:
    """Places of the flattened mask that are True, in order; no wait for the device if their number per row is given."""
    flat = mask.flatten()
    if counts is None:
        return flat.nonzero().squeeze(1)
    return flat.logical_not().byte().argsort(stable=True)[: sum(counts)]


def model_name(model: nn.Module) -> str:
    """What to call a model in a message: where it came from, else its class."""
    lm = _causal_lm(model)
    return str(getattr(getattr(lm, "config", None), "_name_or_path", "") or type(lm).__name__)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, adapters active, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UserError(
            "PEFT methods that prepend learned prompts are not supported; use LoRA or another that changes layers."
        )
    return model.get_base_model()


def _plain_module(getter: str, what: str, model: nn.Module) -> Any:
    """The module whose weight is the matrix in use: PEFT's trained copy of it, if there is one."""
    try:
        module = getattr(_causal_lm(model), getter)()
    except (AttributeError, NotImplementedError):
        module = None
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UserError(
            f"a PEFT adapter changes the {what} of {model_name(model)} without changing the matrix itself; take the module "
            "out of target_modules, or train it whole with modules_to_save"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(f"{model_name(model)} cannot be used: {getter}() gives no matrix for its {what}")
    return module


def _logit_scale(config: Any) -> float:
    for prefix, field, power in _LOGIT_SCALES:
        value = getattr(config, field, None)
        if config.model_type.startswith(prefix) and value is not None:
            return float(value) ** power
    return 1.0
