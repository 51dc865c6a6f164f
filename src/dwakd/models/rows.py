"""Run a model on a batch and select the response positions that a loss reads (`ModelSide`).

Only the backbone runs over the whole batch. No product with the vocabulary is computed here.
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.errors import UserError
from dwakd.models.attention import last_layer
from dwakd.models.head import causal_lm, embedding_table, model_name, output_head
from dwakd.models.probe import Probe, check_causal, check_logits


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
    config = causal_lm(model).config
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
    lm = causal_lm(model)
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
    with last_layer(causal_lm(model).config.get_text_config()) as recorded:
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
