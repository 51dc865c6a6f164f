"""Make an untrained student from a pretrained model, with fewer layers and a smaller vocabulary: `dwakd shrink`.

References:
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
    for the block influence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dwakd.data.prompts import Prompts
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.options import RowOptions
from dwakd.folders import check_output_folder
from dwakd.models.head import model_name, output_head
from dwakd.models.loading import check_vocabulary, load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head, evaluating, final_hidden
from dwakd.models.saving import save_causal_lm
from dwakd.tools.shrink.surgery import build_student, layer_stack
from dwakd.tools.shrink.vocabulary import old_tokens_of, train_tokenizer

_HELD_OUT_TEXTS = _INFLUENCE_TEXTS = 64


@dataclass(frozen=True)
class Measures:
    """Sizes of a model, with tied parameters counted once, and its bits per byte on the held-out texts, if any."""

    vocab_size: int
    parameters: int
    bits_per_byte: float | None


@dataclass(frozen=True)
class ShrinkReport:
    """The result of `shrink_model` in numbers."""

    block_influence: tuple[float, ...] | None  # of each old layer; None if all layers were kept
    kept_layers: tuple[int, ...]  # old indices of the student's layers
    before: Measures
    after: Measures  # without any training


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
        vocab_size: as in `shrink_model`, and so is `num_layers`.
        eval_data: text on which bits per byte are measured. By default this is the last twentieth of `data`, which is
            then not used to train the tokenizer or to measure the influence of layers.

    Raises:
        UserError: the folder is not empty, or the model, the data or a size cannot be used.
    """
    check_output_folder(output, empty=True)
    tokenizer = load_tokenizer(model)
    prompts = Prompts(rows.template or "plain", tokenizer)

    def texts(source: str, split: Sequence[str]) -> list[str]:
        examples = load_examples(source, split=split, **rows.reading())
        return [prompts.render(example) + example.response for example in examples]

    train = texts(data, TRAIN_SPLITS)
    if eval_data is not None:
        held_out = texts(eval_data, EVAL_SPLITS)
    else:
        cut = max(len(train) - max(len(train) // 20, 1), 1)
        train, held_out = train[:cut], train[cut:]
    sizes = {"num_layers": num_layers, "vocab_size": vocab_size}
    original, held_out = load_causal_lm(model), held_out[:_HELD_OUT_TEXTS]
    student, student_tokenizer, report = shrink_model(original, tokenizer, train, held_out=held_out, **sizes)
    save_causal_lm(student, output)
    student_tokenizer.save_pretrained(output)
    return _table(report, output)


def _table(report: ShrinkReport, output: Path) -> Table:
    """Return a table of the sizes and bits per byte before and after."""
    table = Table("", "before", "after", title=f"student in {output}", title_justify="left")
    both = (report.before, report.after)
    num_layers = len(report.block_influence or report.kept_layers)
    table.add_row("layers", str(num_layers), str(len(report.kept_layers)))
    table.add_row("vocabulary", *(f"{model.vocab_size:,}" for model in both))
    table.add_row("parameters", *(f"{model.parameters:,}" for model in both))
    bits = [model.bits_per_byte for model in both]
    table.add_row("bits per byte, untrained", *("-" if value is None else f"{value:.3f}" for value in bits))
    notes = []
    if None in bits:
        notes.append("bits per byte: the data has no row left to measure them on; name other text with --eval-data")
    if report.block_influence is not None:
        influences = enumerate(report.block_influence)
        dropped = [f"{i} ({value:.2f})" for i, value in influences if i not in report.kept_layers]
        notes.append(f"dropped layers, with their influence: {', '.join(dropped) or 'none'}")
    table.caption = "\n".join(notes)
    return table


def shrink_model(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    *,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    held_out: Sequence[str] = (),
) -> tuple[Any, Any, ShrinkReport]:
    """Remove the layers with the smallest block influence and train a new vocabulary on `texts`.

    Args:
        model: a causal language model of transformers; it is not changed.
        tokenizer: its fast tokenizer.
        texts: text like that of the student's training. The tokenizer is trained on all of it, and the influence is
            measured on 64 texts spread evenly over it.
        num_layers: layers to keep, at least 2; None keeps all. The first and the last layer are always kept.
        vocab_size: tokens of the new tokenizer, including special tokens; None keeps the old one.
        held_out: texts on which bits per byte are measured before and after.

    Returns:
        The student (in eval mode, ready for save_pretrained), its tokenizer and a report.

    Raises:
        UserError: neither size is given, a size is out of range, there is no text, or the layers or vocabulary
            matrices of the architecture cannot be found.
    """
    if num_layers is None and vocab_size is None:
        raise UserError("nothing to shrink: set num_layers (--layers), vocab_size (--vocab-size) or both")
    if not any(texts):
        raise UserError("there is no text to shrink the model on: choose a data set with text in it")
    check_head(model)
    check_vocabulary(model, tokenizer, model_name(model))
    kept = list(range(len(layer_stack(model)[1])))
    influence = None
    if num_layers is not None:
        _check_layers(num_layers, len(kept), model_name(model))
        chosen = texts[:: max(1, len(texts) // _INFLUENCE_TEXTS)][:_INFLUENCE_TEXTS]
        influence = block_influence(model, tokenizer, chosen)
        inner = sorted(kept[1:-1], key=lambda index: (-influence[index], index))
        kept = sorted([0, kept[-1], *inner[: num_layers - 2]])
    new_tokenizer, sources = tokenizer, None
    if vocab_size is not None:
        new_tokenizer = train_tokenizer(tokenizer, texts, vocab_size)
        sources = old_tokens_of(tokenizer, new_tokenizer)
    student = build_student(model, kept, sources, tokenizer, new_tokenizer)
    measures = [
        Measures(
            vocab_size=len(words),
            parameters=sum(parameter.numel() for parameter in lm.parameters()),
            bits_per_byte=text_bits_per_byte(lm, words, held_out) if held_out else None,
        )
        for lm, words in ((model, tokenizer), (student, new_tokenizer))
    ]
    return student, new_tokenizer, ShrinkReport(influence, tuple(kept), *measures)


def _check_layers(num_layers: int, available: int, name: str) -> None:
    if available < 3 and num_layers != available:
        raise UserError(
            f"num_layers (--layers) is {num_layers}, but {name} has {available} layers and the first and the last are "
            "always kept: leave the option out"
        )
    if available >= 3 and not 2 <= num_layers <= available:
        raise UserError(f"num_layers (--layers) is {num_layers}, but must be from 2 to {available} for {name}")


@torch.no_grad()
def block_influence(model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512) -> tuple[float, ...]:
    """Compute the block influence of each layer: 1 - mean over all tokens of cos(input of the layer, its output).

    The value is between 0 and 2. Near 0, the layer hardly changes the direction of the hidden states.
    """
    _, layers = layer_stack(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)

    def measure(index: int, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        totals[index] += cosine.sum().double().cpu()

    hooks = [
        layer.register_forward_hook(lambda _, *seen, index=index: measure(index, *seen), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    sequences = [tokenizer(text).input_ids[:max_length] for text in texts]
    try:
        num_tokens = sum(len(ids) for ids, _ in _hidden_states(model, sequences, "Block influence"))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple((1 - totals / num_tokens).tolist())


@torch.no_grad()
def text_bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512) -> float:
    """Compute the sum of -log2 p over the tokens of the texts, divided by their UTF-8 bytes.

    The value can be compared between tokenizers. Each text follows the beginning-of-sequence token, or the
    end-of-sequence token if there is none, so that its first token is predicted, too. No end-of-sequence token is
    predicted after the text. Of a longer text, the first `max_length` tokens are used.

    Raises:
        UserError: the texts have no token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    sequences, num_bytes = [], 0
    for text in texts:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if ids := encoding.input_ids[: max_length - 1]:
            end = len(text) if len(ids) == len(encoding.input_ids) else encoding.offset_mapping[len(ids) - 1][1]
            num_bytes += len(text[:end].encode())
            sequences.append([start, *ids])
    if not num_bytes:
        raise UserError("there is no text to measure bits per byte on: choose texts that are not empty")
    head, nats = output_head(model), 0.0
    for ids, hidden in _hidden_states(model, sequences, "Bits per byte"):
        nats += float(nn.functional.cross_entropy(head.logits(hidden[:-1]), ids[1:], reduction="sum"))
    return nats / math.log(2) / num_bytes


def _hidden_states(
    model: Any, sequences: list[list[int]], title: str
) -> Iterator[tuple[Int[Tensor, " length"], Float[Tensor, "length hidden"]]]:
    """Yield the token ids and the final hidden states of each sequence. Each runs by itself, without padding."""
    with evaluating(model):
        for sequence in track([sequence for sequence in sequences if sequence], description=title):
            ids = torch.tensor([sequence], device=model.get_input_embeddings().weight.device)
            yield ids[0], final_hidden(model, ids, torch.ones_like(ids))[0]
