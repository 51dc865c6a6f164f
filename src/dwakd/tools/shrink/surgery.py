"""Rebuild a model with fewer layers or other vocabulary matrices."""

import copy
from typing import Any

from torch import Tensor, nn

from dwakd.errors import UserError
from dwakd.models.head import model_name
from dwakd.tools.shrink.vocabulary import averaged_rows


def layer_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """Find the transformer layers and their path: the outermost ModuleList with `num_hidden_layers` entries."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UserError(
        f"{model_name(model)} cannot be shrunk, because no stack of {count} layers was found in it: use another model"
    )


def build_student(
    model: Any, kept: list[int], sources: list[list[int]] | None, tokenizer: Any, new_tokenizer: Any
) -> Any:
    """Build a model of the same class from the weights of the kept layers and averaged vocabulary matrices.

    Args:
        model: the old model; it is not changed.
        kept: old indices of the layers to keep, in order.
        sources: old tokens of each new token, from `old_tokens_of`; None keeps the vocabulary.
        tokenizer: the old tokenizer.
        new_tokenizer: the new tokenizer, whose special ids are written to config and generation config.

    Raises:
        UserError: the architecture has other parts for each layer or token than this function handles.
    """
    prefix = f"{layer_stack(model)[0]}."
    renamed = {}
    for name, tensor in _state(model, sources).items():
        index, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            renamed[name] = tensor
        elif int(index) in kept:
            renamed[f"{prefix}{kept.index(int(index))}.{rest}"] = tensor
    config, generation = _student_config(model.config, kept), copy.deepcopy(model.generation_config)
    if sources is not None:
        config.vocab_size = len(sources)
        for settings in (config, generation):
            _renew_token_ids(settings, tokenizer, new_tokenizer)
    try:
        student = type(model)(config).to(model.dtype)
        student.load_state_dict(renamed)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{model_name(model)} has an architecture that cannot be shrunk ({reason}): use another model"
        ) from error
    student.generation_config = generation
    return student.to(model.device).eval()


def _state(model: Any, sources: list[list[int]] | None) -> dict[str, Tensor]:
    """Return the state dict, with new vocabulary entries in the input embeddings, the head and its bias."""
    state = dict(model.state_dict())
    if sources is None:
        return state
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is model.get_input_embeddings().weight or parameter is head.weight:
            state[name] = averaged_rows(parameter, sources)
        elif bias is not None and parameter is bias:
            state[name] = averaged_rows(bias[:, None], sources)[:, 0]
    return state


def _student_config(config: Any, kept: list[int]) -> Any:
    """Return the config with the kept layers only, also in every list that has one entry for each layer."""
    values = copy.deepcopy(config.to_dict())
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = values[count_name]
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            values[name] = [value[index] for index in kept]
    values[count_name] = len(kept)
    return type(config).from_dict(values)


def _renew_token_ids(settings: Any, tokenizer: Any, new_tokenizer: Any) -> None:
    """Replace every `..._token_id` by the new id of the same token, or of the new tokenizer's own if it is gone."""
    vocab, specials = new_tokenizer.get_vocab(), tokenizer.get_added_vocab()
    new_ids = {index: vocab[token] for token, index in specials.items() if token in vocab}
    for name, value in settings.to_dict().items():
        if not name.endswith("_token_id") or value is None:
            continue
        new = [new_ids[index] for index in (value if isinstance(value, list) else [value]) if index in new_ids]
        if isinstance(value, list) and new:
            setattr(settings, name, new)
        else:
            setattr(settings, name, new[0] if new else getattr(new_tokenizer, name, None))
