"""Answers of a model: sampled or greedy, in batches, the same whatever the batches."""

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
from dwakd.evaluation.sampling import SeededSampling, streams
from dwakd.models.rows import evaluating


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Args:
        rows: their positions in the list of examples.
        prompts: their token ids, unpadded.
        max_new_tokens: tokens that each answer may have.
    """

    rows: list[int]
    prompts: list[list[int]]
    max_new_tokens: int


def generate_answers(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    seed: int,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """One answer per example, in the order of the examples.

    The model's own generation settings (temperature, top-p, top-k, repetition penalty, length ...) play no part;
    with the defaults every token is drawn from the model's full distribution. An answer ends at any of the
    encoder's end tokens, or after min(max_new_tokens, the model's positions minus the tokens of its prompt) tokens.

    Args:
        seed: of the streams of random numbers, one per row; unused when greedy. Not negative.
        do_sample: sample, or take the likeliest token each time.
        temperature: divides the logits; above 0.
        top_p: keep the likeliest tokens that together reach this probability; in (0, 1].
        max_new_tokens: limit of an answer in tokens.
        batch_size: prompts per forward; changes the speed and not the answers.
        progress: show a bar on standard error.

    Raises:
        UserError: an option out of range, a prompt without tokens, or one that fills all the model's positions.
    """
    batches = plan_batches(model, encoder, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task("answers", total=len(batches))
        return answer_batches(
            model,
            encoder,
            batches,
            seed=seed if do_sample else None,
            temperature=temperature,
            top_p=top_p,
            on_batch=lambda: bar.advance(task),
        )


def plan_batches(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[PromptBatch]:
    """Batches of prompts of like length, the longest first; all of a batch have the same limit of new tokens."""
    _check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
    positions = max_positions(model)
    prompts = answerable_prompts(model, encoder, examples)
    limits = [max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids)) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    batches = []
    for limit, group in groupby(order, key=lambda row: limits[row]):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batches.append(PromptBatch(chosen, [prompts[row] for row in chosen], limit))
    return batches


def answerable_prompts(
    model: PreTrainedModel | PeftModel, encoder: TextEncoder, examples: Sequence[Example], source: str = "the examples"
) -> list[list[int]]:
    """The token ids of every prompt, unpadded.

    Args:
        source: what messages call the examples.

    Raises:
        UserError: a prompt without tokens, or one that fills all the model's positions.
    """
    positions = max_positions(model)
    prompts = encoder.prompt_ids_batch(examples) if examples else []
    for example, prompt in zip(examples, prompts, strict=True):
        row = f"{source}, row {example.index} (counting from 0)"
        if not prompt:
            raise UserError(f"{row}: the prompt has no tokens; give it an instruction or another template.")
        if positions is not None and len(prompt) >= positions:
            raise UserError(
                f"{row}: its prompt of {len(prompt)} tokens leaves no room for an answer in the model's {positions} "
                "positions; shorten or remove it."
            )
    return prompts


def answer_batches(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    batches: Sequence[PromptBatch],
    *,
    seed: int | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answers in the order of the examples that `plan_batches` got.

    Args:
        seed: of the sampling; None decodes greedily.
        on_batch: called after each batch.
    """
    _check_sampling(seed, temperature, top_p)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    answers: dict[int, str] = {}
    with evaluating(model):
        for batch in batches:
            sampler = None if seed is None else _sampler(batch, seed, temperature, top_p, base.device)
            for row, ids in zip(batch.rows, _continue(base, encoder, batch, sampler), strict=True):
                answers[row] = _decode(encoder, ids)
            on_batch()
    return [answers[row] for row in sorted(answers)]


def progress_bar(*, disable: bool) -> bars.Progress:
    """The bar of an evaluation: done, of how many, time spent, time left; on standard error."""
    counts = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    return bars.Progress(*counts, *times, console=Console(stderr=True), disable=disable)


def pad_id_of(encoder: TextEncoder) -> int:
    """The tokenizer's padding token, else the end token: padding is masked, so any token will do."""
    pad_id = encoder.tokenizer.pad_token_id
    return encoder.end_token_id if pad_id is None else int(pad_id)


def max_positions(model: Any) -> int | None:
    """Positions that the model has embeddings or rotations for; None where it knows no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _sampler(batch: PromptBatch, seed: int, temperature: float, top_p: float, device: torch.device) -> SeededSampling:
    uniforms = streams(seed, batch.rows, batch.max_new_tokens, device)
    return SeededSampling(uniforms, max(map(len, batch.prompts)), temperature, top_p)


def _continue(
    model: PreTrainedModel, encoder: TextEncoder, batch: PromptBatch, sampler: SeededSampling | None
) -> list[list[int]]:
    """New token ids per prompt; an answer that ended is followed by padding up to the longest one's end."""
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
    """`generate` fills whatever its argument leaves unset from the model's settings, so those go for the while."""
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


def _check_at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")


def _check_sampling(seed: int | None, temperature: float, top_p: float) -> None:
    if seed is not None and seed < 0:
        raise UserError(f"a seed must not be negative, got {seed}.")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}; for the likeliest tokens decode greedily.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}.")
