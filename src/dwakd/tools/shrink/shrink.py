"""A student made from a pretrained model: fewer layers, a smaller vocabulary, no training yet.

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
    """What `shrink_model` did.

    Args:
        block_influence: of each old layer, or None where all layers were kept.
        kept_layers: old indices of the student's layers.
        vocab_size_before: tokens of the old tokenizer.
        vocab_size_after: tokens of the new one; below the size asked for where the texts are too few.
        shared_tokens: tokens of the new vocabulary that the old one has, too.
        parameters_before: number of parameters of the old model, tied ones once.
        parameters_after: the same of the student.
        bits_per_byte_before: of the old model on the held-out texts, or None without any.
        bits_per_byte_after: of the student on the same texts, before any training.
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
    """Drop the layers of least block influence and replace the vocabulary by one learnt from `texts`.

    Args:
        model: a transformers causal LM; left as it is.
        tokenizer: its fast tokenizer.
        texts: what the student will see. The tokenizer is trained on all of them; the influence is measured on 64
            spread evenly over them.
        num_layers: layers to keep, 2 to all; None keeps all. The first and the last always stay.
        vocab_size: tokens of the new tokenizer, special tokens included; None keeps the old one.
        held_out: texts for bits per byte before and after.
        progress: show progress bars.

    Returns:
        The student (in eval mode, ready for save_pretrained), its tokenizer and a report.

    Raises:
        UserError: nothing asked for, a size out of range (names the range), no texts, or an architecture whose
            layers or vocabulary matrices are not where they are expected.
    """
    if num_layers is None and vocab_size is None:
        raise UserError("Nothing to shrink: give num_layers (--layers), vocab_size (--vocab-size) or both.")
    if not any(texts):
        raise UserError("There are no texts to shrink the model on; give a data set with text in it.")
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
    """Per layer, 1 - the mean over the texts' tokens of cos(layer's input, layer's output); padding left out.

    Near 0: the layer hardly turns the hidden states; range 0 to 2.
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
    """Sum of -log2 p over the tokens of the texts, divided by their UTF-8 bytes; comparable across tokenizers.

    Each text is read after the beginning-of-sequence token (else end-of-sequence), so that its first token counts;
    the end-of-sequence token does not. A text longer than `max_length` tokens counts as far as it is read.

    Raises:
        UserError: the texts hold no token.
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
        raise UserError("There is no text to measure bits per byte on; give texts that are not empty.")
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
    """Input ids and attention mask, right-padded; sequences of like length go together."""
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
                f"{name} has no layer to drop (it has {available}, and the first and the last stay); leave out "
                "num_layers (--layers)."
            )
    elif not 2 <= num_layers <= available:
        raise UserError(f"num_layers (--layers) is {num_layers}, but {name} allows 2 to {available}.")


def _most_influential(influence: Sequence[float], num_layers: int) -> list[int]:
    """Indices of the layers to keep, in order; the first and the last are always among them."""
    last = len(influence) - 1
    inner = sorted(range(1, last), key=lambda index: (-influence[index], index))
    return sorted([0, last, *inner[: num_layers - 2]])
