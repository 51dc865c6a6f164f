"""Make an untrained student from a pretrained model, with fewer layers and a smaller vocabulary.

References:
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
    for the block influence.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor, nn

from dwakd.errors import UserError
from dwakd.models.loading import check_vocabulary
from dwakd.models.rows import check_head, evaluating, final_hidden, model_name, output_head
from dwakd.tools.shrink.surgery import build_student, layer_stack
from dwakd.tools.shrink.vocabulary import old_tokens_of, train_tokenizer

_INFLUENCE_TEXTS = 64
_ROWS_PER_PRODUCT = 512


@dataclass(frozen=True)
class ShrinkReport:
    """The result of `shrink_model` in numbers.

    Args:
        block_influence: block influence of each old layer, or None if all layers were kept.
        kept_layers: old indices of the student's layers.
        vocab_size_before: tokens of the old tokenizer.
        vocab_size_after: tokens of the new tokenizer; fewer than requested if there is too little text.
        shared_tokens: tokens that are in both vocabularies.
        parameters_before: number of parameters of the old model; tied parameters are counted once.
        parameters_after: number of parameters of the student.
        bits_per_byte_before: bits per byte of the old model on the held-out texts, or None if there are none.
        bits_per_byte_after: bits per byte of the student on the same texts, before any training.
    """

    block_influence: tuple[float, ...] | None
    kept_layers: tuple[int, ...]
    vocab_size_before: int
    vocab_size_after: int
    shared_tokens: int
    parameters_before: int
    parameters_after: int
    bits_per_byte_before: float | None = None
    bits_per_byte_after: float | None = None


def shrink_model(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    *,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    held_out: Sequence[str] = (),
    progress: bool = True,
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
        progress: show progress bars.

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
    path, layers = layer_stack(model)
    influence, kept = None, list(range(len(layers)))
    if num_layers is not None:
        _check_layers(num_layers, len(layers), model_name(model))
        chosen = texts[:: max(1, len(texts) // _INFLUENCE_TEXTS)][:_INFLUENCE_TEXTS]
        influence = block_influence(model, tokenizer, chosen, progress=progress)
        kept = _most_influential(influence, num_layers)
    new_tokenizer, sources = tokenizer, None
    if vocab_size is not None:
        new_tokenizer = train_tokenizer(tokenizer, texts, vocab_size)
        sources = old_tokens_of(tokenizer, new_tokenizer)
    student = build_student(model, path, kept, sources, tokenizer, new_tokenizer)
    before = text_bits_per_byte(model, tokenizer, held_out, progress=progress) if held_out else None
    after = text_bits_per_byte(student, new_tokenizer, held_out, progress=progress) if held_out else None
    report = ShrinkReport(
        block_influence=influence,
        kept_layers=tuple(kept),
        vocab_size_before=len(tokenizer),
        vocab_size_after=len(new_tokenizer),
        shared_tokens=len(tokenizer.get_vocab().keys() & new_tokenizer.get_vocab().keys()),
        parameters_before=sum(parameter.numel() for parameter in model.parameters()),
        parameters_after=sum(parameter.numel() for parameter in student.parameters()),
        bits_per_byte_before=before,
        bits_per_byte_after=after,
    )
    return student, new_tokenizer, report


def block_influence(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> tuple[float, ...]:
    """Compute the block influence of each layer: 1 - mean over all tokens of cos(input of the layer, its output).

    The value is between 0 and 2. Near 0, the layer hardly changes the direction of the hidden states. Padding is
    left out.
    """
    _, layers = layer_stack(model)
    sequences = [tokenizer(text).input_ids[:max_length] for text in texts]
    totals = torch.zeros(len(layers), dtype=torch.float64)
    num_tokens = 0
    mask = torch.empty(0)

    def measure(index: int, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        totals[index] += cosine[mask.bool()].sum().double().cpu()

    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, named, output, index=index: measure(index, inputs, named, output), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        with evaluating(model), torch.no_grad():
            for input_ids, mask in _batches(sequences, batch_size, model, "Block influence", progress):
                final_hidden(model, input_ids, mask)
                num_tokens += int(mask.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return tuple((1 - totals / num_tokens).tolist())


def text_bits_per_byte(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int = 8,
    max_length: int = 512,
    *,
    progress: bool = False,
) -> float:
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
        ids = encoding.input_ids[: max_length - 1]
        if ids:
            end = len(text) if len(ids) == len(encoding.input_ids) else encoding.offset_mapping[len(ids) - 1][1]
            num_bytes += len(text[:end].encode())
            sequences.append([start, *ids])
    if not num_bytes:
        raise UserError("there is no text to measure bits per byte on: choose texts that are not empty")
    head, nats = output_head(model).detached(), 0.0
    with evaluating(model), torch.no_grad():
        for input_ids, mask in _batches(sequences, batch_size, model, "Bits per byte", progress):
            counted = mask[:, 1:].bool()
            hidden = final_hidden(model, input_ids, mask)[:, :-1][counted]
            targets = input_ids[:, 1:][counted]
            for rows, ids in zip(
                torch.split(hidden, _ROWS_PER_PRODUCT), torch.split(targets, _ROWS_PER_PRODUCT), strict=True
            ):
                nats += float(nn.functional.cross_entropy(head.logits(rows), ids, reduction="sum"))
    return nats / math.log(2) / num_bytes


def _batches(
    sequences: list[list[int]], batch_size: int, model: Any, title: str, progress: bool
) -> Iterator[tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]]:
    """Yield batches of sequences of similar length as right-padded input ids and attention masks."""
    device = model.get_input_embeddings().weight.device
    ordered = sorted((sequence for sequence in sequences if sequence), key=len)
    starts = range(0, len(ordered), batch_size)
    for start in track(starts, description=title, disable=not progress):
        rows = [torch.tensor(sequence) for sequence in ordered[start : start + batch_size]]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield input_ids.to(device), mask.to(device)


def _check_layers(num_layers: int, available: int, name: str) -> None:
    if available < 3:
        if num_layers != available:
            raise UserError(
                f"num_layers (--layers) is {num_layers}, but {name} has {available} layers and the first and the last "
                "are always kept: leave the option out"
            )
    elif not 2 <= num_layers <= available:
        raise UserError(f"num_layers (--layers) is {num_layers}, but must be from 2 to {available} for {name}")


def _most_influential(influence: Sequence[float], num_layers: int) -> list[int]:
    """Return the indices of the layers to keep, in order; these include the first and the last."""
    last = len(influence) - 1
    inner = sorted(range(1, last), key=lambda index: (-influence[index], index))
    return sorted([0, last, *inner[: num_layers - 2]])
