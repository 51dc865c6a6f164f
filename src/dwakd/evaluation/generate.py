"""Generate sampled or greedy answers in batches; the batch size does not change an answer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from rich import progress as bars
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.options import DecodingOptions, GenerationOptions
from dwakd.evaluation.sampling import SeededSampling, streams
from dwakd.models.rows import evaluating


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Args:
        rows: positions of the prompts in the list of examples.
        prompts: token ids of each prompt, unpadded.
        max_new_tokens: most tokens of each answer.
    """

    rows: list[int]
    prompts: list[list[int]]
    max_new_tokens: int


def generate_answers(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: GenerationOptions,
    *,
    progress: bool = True,
) -> list[str]:
    """Generate one answer for each example, in the order of the examples.

    The model's own generation settings (temperature, top-p, top-k, repetition penalty, length ...) are ignored. With
    the default options every token is drawn from the model's full distribution. An answer ends at any of the
    encoder's end tokens, or after min(max_new_tokens, the model's positions minus the tokens of its prompt) tokens.

    Args:
        model: the model, with or without an adapter.
        encoder: turns rows into prompts and answers into text.
        examples: the rows to answer.
        options: the seed and how to decode. Every row has its own stream of random numbers.
        progress: show a progress bar on standard error.

    Raises:
        UserError: a prompt has no tokens, or fills all the model's positions.
    """
    batches = plan_batches(model, encoder, examples, options)
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task("answers", total=len(batches))
        return answer_batches(model, encoder, batches, options, on_batch=lambda: bar.advance(task))


def plan_batches(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: DecodingOptions,
) -> list[PromptBatch]:
    """Group prompts of similar length, the longest first; the prompts of a batch have the same limit of new tokens."""
    positions = max_positions(model)
    prompts = answerable_prompts(model, encoder, examples)
    most = options.max_new_tokens
    limits = [most if positions is None else min(most, positions - len(ids)) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    batches = []
    for limit, group in groupby(order, key=lambda row: limits[row]):
        rows = list(group)
        for start in range(0, len(rows), options.batch_size):
            chosen = rows[start : start + options.batch_size]
            batches.append(PromptBatch(chosen, [prompts[row] for row in chosen], limit))
    return batches


def answerable_prompts(
    model: PreTrainedModel | PeftModel, encoder: TextEncoder, examples: Sequence[Example], source: str = "the examples"
) -> list[list[int]]:
    """Return the token ids of every prompt, unpadded.

    Args:
        model: the model that is to answer.
        encoder: turns rows into prompts.
        examples: the rows.
        source: name of the rows in error messages.

    Raises:
        UserError: a prompt has no tokens, or fills all the model's positions.
    """
    positions = max_positions(model)
    prompts = encoder.prompt_ids_batch(examples) if examples else []
    for example, prompt in zip(examples, prompts, strict=True):
        row = f"{source}, row {example.index} (counting from 0)"
        if not prompt:
            raise UserError(f"{row}: the prompt has no tokens: give it an instruction or use another template")
        if positions is not None and len(prompt) >= positions:
            raise UserError(
                f"{row}: its prompt of {len(prompt)} tokens leaves no room for an answer in the model's {positions} "
                "positions: shorten or remove it"
            )
    return prompts


def answer_batches(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    batches: Sequence[PromptBatch],
    options: GenerationOptions,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answer the batches of `plan_batches`, in the order of its examples; `on_batch` is called after each batch."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    answers: dict[int, str] = {}
    with evaluating(model):
        for batch in batches:
            sampler = _sampler(batch, options, base.device)
            for row, ids in zip(batch.rows, _continue(base, encoder, batch, sampler), strict=True):
                answers[row] = _decode(encoder, ids)
            on_batch()
    return [answers[row] for row in sorted(answers)]


def progress_bar(*, disable: bool) -> bars.Progress:
    """Return a progress bar on standard error, with counts, elapsed time and remaining time."""
    counts = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    return bars.Progress(*counts, *times, console=Console(stderr=True), disable=disable)


def pad_id_of(encoder: TextEncoder) -> int:
    """Return the padding token, or the end token if there is none: padding is masked, so any token is correct."""
    pad_id = encoder.tokenizer.pad_token_id
    return encoder.end_token_id if pad_id is None else int(pad_id)


def max_positions(model: Any) -> int | None:
    """Return how many positions the model has embeddings or rotations for, or None if it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _sampler(batch: PromptBatch, options: GenerationOptions, device: torch.device) -> SeededSampling | None:
    if options.seed is None:
        return None
    uniforms = streams(options.seed, batch.rows, batch.max_new_tokens, device)
    return SeededSampling(uniforms, max(map(len, batch.prompts)), options.temperature, options.top_p)


def _continue(
    model: PreTrainedModel, encoder: TextEncoder, batch: PromptBatch, sampler: SeededSampling | None
) -> list[list[int]]:
    """Return the new token ids of each prompt; shorter answers are padded to the length of the longest."""
    input_ids, attention_mask = _pad_left(batch.prompts, pad_id_of(encoder))
    config = GenerationConfig(
        do_sample=False,  # the sampler, if any, has left one token possible
        max_new_tokens=batch.max_new_tokens,
        eos_token_id=encoder.end_token_ids,
        pad_token_id=pad_id_of(encoder),
        use_cache=True,
    )
    with _only_settings(model, config):
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            logits_processor=[] if sampler is None else [sampler],
        )
    new_ids: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return new_ids


@contextmanager
def _only_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation settings for a while, since `generate` takes what `config` leaves unset from them."""
    saved = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved


def _pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad_id)
    attention_mask = torch.zeros((len(prompts), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids, attention_mask


def _decode(encoder: TextEncoder, ids: Sequence[int]) -> str:
    end = next((place for place, token in enumerate(ids) if token in encoder.end_token_ids), len(ids))
    decode: Callable[..., str] = encoder.tokenizer.decode
    return decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
