"""Make an untrained student from a pretrained model, with fewer layers and a smaller vocabulary: `dwakd shrink`.

References:
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
    for the block influence.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import nn

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte
from dwakd.evaluation.generate import max_positions
from dwakd.evaluation.options import RowOptions
from dwakd.folders import check_output_folder
from dwakd.models.head import model_name
from dwakd.models.loading import check_vocabulary, load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head, evaluating
from dwakd.models.saving import save_causal_lm
from dwakd.tools.shrink.vocabulary import averaged_rows, old_tokens_of, train_tokenizer

_HELD_OUT_ROWS = _INFLUENCE_TEXTS = 64


class Shrunk(NamedTuple):
    """The result of `shrink_model`."""

    student: Any  # in eval mode, ready for save_pretrained
    tokenizer: Any
    kept_layers: list[int]  # old indices of the student's layers
    influence: list[float]  # block influence of each old layer but the last; empty if all layers were kept


def shrink_to_folder(
    model: str,
    data: str,
    output: Path,
    rows: RowOptions,
    *,
    vocab_size: int | None = None,
    num_layers: int | None = None,
    eval_data: str | None = None,
) -> Table:
    """Shrink a model with `shrink_model`, save the student as a Hugging Face folder and return a report.

    Args:
        model: folder, hub id or GGUF file of the model.
        data: file or hub id of the text.
        output: folder of the student; must be empty or not exist.
        rows: how to read the rows and turn prompts into text.
        eval_data: rows on which bits per byte are measured. By default these are the last twentieth of `data`, which
            `shrink_model` then does not get.

    Raises:
        UserError: the folder is not empty, or the model, the data or a size cannot be used.
    """
    check_output_folder(output, empty=True)
    tokenizer, template = load_tokenizer(model), rows.template or "plain"
    encoder = TextEncoder(tokenizer, template)
    examples = load_examples(data, split=TRAIN_SPLITS, **rows.reading())
    if eval_data is not None:
        held_out = load_examples(eval_data, split=EVAL_SPLITS, **rows.reading())
    else:
        cut = max(len(examples) - max(len(examples) // 20, 1), 1)
        examples, held_out = examples[:cut], examples[cut:]
    texts = [encoder.prompt_text(each) + each.response for each in map(encoder.with_response, examples)]
    original = load_causal_lm(model)
    shrunk = shrink_model(original, tokenizer, texts, num_layers=num_layers, vocab_size=vocab_size)
    save_causal_lm(shrunk.student, output)
    shrunk.tokenizer.save_pretrained(output)
    both = (original, tokenizer), shrunk[:2]
    table = Table("", "before", "after", title=Text(f"student in {output}"), title_justify="left")
    table.add_row("layers", *(str(lm.config.get_text_config().num_hidden_layers) for lm, _ in both))
    table.add_row("vocabulary", *(f"{len(words):,}" for _, words in both))
    table.add_row("parameters", *(f"{lm.num_parameters():,}" for lm, _ in both))
    held_out = held_out[:_HELD_OUT_ROWS]
    bits = [bits_per_byte(lm, TextEncoder(words, template), held_out, progress=True) for lm, words in both]
    table.add_row("bits per byte, untrained", *("-" if found is None else f"{found.value:.3f}" for found in bits))
    notes = []
    if None in bits:
        notes.append("bits per byte: the data has no row left to measure them on; name other rows with --eval-data")
    if shrunk.influence:
        dropped = [f"{i} ({value:.2f})" for i, value in enumerate(shrunk.influence) if i not in shrunk.kept_layers]
        notes.append(f"dropped layers, with their influence: {', '.join(dropped)}")
    table.caption = "\n".join(notes)
    return table


def shrink_model(
    model: Any, tokenizer: Any, texts: list[str], *, num_layers: int | None = None, vocab_size: int | None = None
) -> Shrunk:
    """Remove the layers with the smallest block influence and train a new vocabulary on `texts`.

    Args:
        model: a causal language model of transformers; it is not changed.
        tokenizer: its fast tokenizer.
        texts: text like that of the student's training. The tokenizer is trained on all of it, and the influence is
            measured on 64 texts spread evenly over it.
        num_layers: layers to keep, at least 2; None keeps all. The first and the last layer are always kept.
        vocab_size: tokens of the new tokenizer, including special tokens; None keeps the old one.

    Raises:
        UserError: neither size is given, a size is out of range, there is no text, or the layers or vocabulary
            matrices of the architecture cannot be found.
    """
    if num_layers is None and vocab_size is None:
        raise UserError("nothing to shrink: set num_layers (--layers), vocab_size (--vocab-size) or both")
    texts = list(filter(None, texts))
    if not texts:
        raise UserError("there is no text to shrink the model on: choose a data set with text in it")
    check_head(model)
    check_vocabulary(model, tokenizer, model_name(model))
    prefix = _layer_prefix(model)
    kept, influence = list(range(model.config.get_text_config().num_hidden_layers)), []
    if num_layers not in (None, len(kept)):
        _check_layers(num_layers, len(kept), model_name(model))
        count = min(_INFLUENCE_TEXTS, len(texts))
        chosen = [texts[number * len(texts) // count] for number in range(count)]
        influence = block_influence(model, tokenizer, chosen)
        inner = sorted(kept[1:-1], key=lambda index: (-influence[index], index))
        kept = sorted([0, kept[-1], *inner[: num_layers - 2]])
    new_tokenizer = tokenizer if vocab_size is None else train_tokenizer(tokenizer, texts, vocab_size)
    student = _build_student(model, prefix, kept, tokenizer, new_tokenizer)
    return Shrunk(student, new_tokenizer, kept, influence)


def _check_layers(num_layers: int, available: int, name: str) -> None:
    if available < 3:
        raise UserError(
            f"num_layers (--layers) is {num_layers}, but {name} has {available} layers and the first and the last are "
            "always kept: leave the option out"
        )
    if not 2 <= num_layers <= available:
        raise UserError(f"num_layers (--layers) is {num_layers}, but must be from 2 to {available} for {name}")


@torch.no_grad()
def block_influence(model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512) -> list[float]:
    """Compute the block influence of each layer: 1 - mean over all tokens of cos(input of the layer, its output).

    The value is between 0 and 2. Near 0, the layer hardly changes the direction of the hidden states. The last layer is
    left out, because transformers returns its output only after the final norm.
    """
    cosines = []
    length = min(max_length, max_positions(model))
    with evaluating(model):
        for text in track(texts, description="Block influence"):
            if ids := tokenizer(text).input_ids[:length]:
                states = model(torch.tensor([ids], device=model.device), output_hidden_states=True).hidden_states
                before, after = (torch.stack(part).double() for part in (states[:-2], states[1:-1]))
                cosines.append(nn.functional.cosine_similarity(before, after, dim=-1).flatten(1).cpu())
    return (1 - torch.cat(cosines, dim=1).mean(1)).tolist()


def _layer_prefix(model: Any) -> str:
    """Return the beginning of the names of the layers: the outermost ModuleList with `num_hidden_layers` entries."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{path}."
    raise UserError(
        f"{model_name(model)} cannot be shrunk, because no stack of {count} layers was found in it: use another model"
    )


def _build_student(model: Any, prefix: str, kept: list[int], tokenizer: Any, new_tokenizer: Any) -> Any:
    """Build a model of the same class from the weights of the kept layers and averaged vocabulary matrices."""
    sources = None if new_tokenizer is tokenizer else old_tokens_of(tokenizer, new_tokenizer)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {id(tensor) for tensor in (table.weight, head.weight, getattr(head, "bias", None))}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        index, _, rest = name.removeprefix(prefix).partition(".")
        if sources is not None and id(tensor) in matrices:
            state[name] = averaged_rows(tensor, sources)
        elif not name.startswith(prefix):
            state[name] = tensor
        elif int(index) in kept:
            state[f"{prefix}{kept.index(int(index))}.{rest}"] = tensor
    config, generation = _student_config(model.config, kept), copy.deepcopy(model.generation_config)
    if sources is not None:
        config.vocab_size = len(sources)
        for settings in (config, generation):
            _renew_token_ids(settings, tokenizer, new_tokenizer)
    try:
        student = type(model)(config).to(model.dtype)
        student.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # it has other parts for each layer or token
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{model_name(model)} has an architecture that cannot be shrunk ({reason}): use another model"
        ) from error
    student.generation_config = generation
    return student.to(model.device).eval()


def _student_config(config: Any, kept: list[int]) -> Any:
    """Return the config with the kept layers only, also in every list that has one entry for each layer."""
    values = copy.deepcopy(config.to_dict())
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == values[count_name]:
            values[name] = [value[index] for index in kept]
    return type(config).from_dict({**values, count_name: len(kept)})


def _renew_token_ids(settings: Any, tokenizer: Any, new_tokenizer: Any) -> None:
    """Replace every `..._token_id` by the new id of the same token, or of the new tokenizer's own if it is gone."""
    vocab, specials = new_tokenizer.get_vocab(), tokenizer.get_added_vocab()
    new_ids = {index: vocab[token] for token, index in specials.items() if token in vocab}
    for name, value in settings.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            several = isinstance(value, list)
            new = [new_ids[index] for index in (value if several else [value]) if index in new_ids]
            own = getattr(new_tokenizer, name, None)
            setattr(settings, name, (new if several else new[0]) if new else own)
