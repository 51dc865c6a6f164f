"""Generate sampled or greedy answers in batches, so that the batch size does not change an answer.

`torch.multinomial` draws all rows of a batch from one global stream of random numbers. Here, row `i` has its own stream
for a seed `s`, with one uniform number for each token, and a token is the inverse of the cumulative distribution at
that number. Apart from rounding in padded forward passes, an answer depends only on the model, its prompt, `s` and `i`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from rich import progress as bars
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, TopPLogitsWarper

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.environment import widest_float
from dwakd.errors import UserError
from dwakd.evaluation.options import DecodingOptions, GenerationOptions
from dwakd.models.head import attention_precision, num_embeddings
from dwakd.models.rows import evaluating

Model: TypeAlias = PreTrainedModel | PeftModel


def generate_answers(
    model: Model,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: GenerationOptions,
    *,
    progress: bool = True,
) -> list[str]:
    """Generate one answer for each example, in the order of the examples.

    The model's own generation settings (temperature, top-p, repetition penalty, length ...) are ignored. An answer
    ends at any of the encoder's end tokens, after `max_new_tokens` tokens, or at the model's last position.

    Raises:
        UserError: a prompt has no tokens, or fills all the model's positions.
    """
    return answer_passes(model, encoder, examples, [options], progress=progress)[0]


def answer_passes(
    model: Model, encoder: TextEncoder, examples: Sequence[Example], passes: list[GenerationOptions], *, progress: bool
) -> list[list[str]]:
    """Return `generate_answers` of each pass; the passes differ only in their sampling and share a progress bar."""
    batches = plan_batches(model, encoder, examples, passes[0])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    answers = [[""] * len(examples) for _ in passes]
    work = [(texts, options, batch) for texts, options in zip(answers, passes, strict=True) for batch in batches]
    with evaluating(model), progress_bar(disable=not progress) as bar:
        for texts, options, batch in bar.track(work, description="answers"):
            for row, answer in zip(batch.rows, generate_batch(base, encoder, batch, options), strict=True):
                texts[row] = answer.text
    return answers


class Generated(NamedTuple):
    """An answer of a model."""

    text: str
    ids: list[int]  # without the end token
    ended: bool  # false if the answer was cut before an end token
    log_prob: float  # the model's mean log-probability per token at temperature 1, with the end token


class PromptBatch(NamedTuple):
    """Prompts that are answered together, without padding; `rows` are their positions in the list of prompts."""

    rows: list[int]
    prompts: list[list[int]]
    limits: list[int]  # maximum number of new tokens of each answer

    @property
    def max_new_tokens(self) -> int:
        """The largest of the limits."""
        return max(self.limits)


def plan_batches(
    model: Model, encoder: TextEncoder, examples: Sequence[Example], options: DecodingOptions
) -> list[PromptBatch]:
    """Group the prompts of examples as `group_prompts` does, limited by the positions of the model."""
    prompts = answerable_prompts(model, encoder, examples)
    limits = [min(options.max_new_tokens, max_positions(model) - len(ids)) for ids in prompts]
    return group_prompts(model, prompts, limits, options.batch_size)


def group_prompts(
    model: Model, prompts: Sequence[list[int]], limits: Sequence[int], batch_size: int
) -> list[PromptBatch]:
    """Group prompts of similar length, the longest first.

    An answer may be generated up to the largest limit of its batch, of which only the tokens up to its own limit are
    returned. A batch is therefore smaller than `batch_size` if its longest prompt has no positions for the largest limit.
    """
    positions = max_positions(model)
    batches: list[PromptBatch] = []
    for row in sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row)):
        prompt, limit = prompts[row], limits[row]
        last = batches[-1] if batches else None
        if last is None or len(last.rows) == batch_size or len(last.prompts[0]) + limit > positions:
            batches.append(last := PromptBatch([], [], []))
        last.rows.append(row)
        last.prompts.append(prompt)
        last.limits.append(limit)
    return batches


def answerable_prompts(
    model: Model, encoder: TextEncoder, examples: Sequence[Example], source: str = "the examples"
) -> list[list[int]]:
    """Return the token ids of every prompt; raise a UserError if the model cannot answer one, such as an empty one."""
    positions, table_rows = max_positions(model), num_embeddings(model)
    try:
        prompts = encoder.prompt_ids_batch(examples) if examples else []
    except UserError as error:  # a chat template refuses a row
        raise UserError(f"{source}, {error}") from error
    for example, prompt in zip(examples, prompts, strict=True):
        row = f"{source}, {example.place}"
        if not prompt:
            raise UserError(f"{row}: the prompt has no tokens: give it an instruction or use another template")
        if len(prompt) >= positions:
            raise UserError(
                f"{row}: its prompt of {len(prompt)} tokens leaves no room for an answer in the model's {positions} "
                "positions: shorten or remove it"
            )
        encoder.check_embeddings(prompt, table_rows, row)
    return prompts


def generate_batch(
    model: PreTrainedModel,
    encoder: TextEncoder,
    batch: PromptBatch,
    options: GenerationOptions,
    uniforms: Float[Tensor, "batch steps"] | None = None,
) -> list[Generated]:
    """Answer the prompts of a batch.

    If `options.seed` is not None, tokens are sampled with the uniform numbers, by default those of the seed and
    `batch.rows` (see `streams`).
    """
    prompts = [torch.tensor(ids) for ids in batch.prompts]
    ends, pad_id = encoder.end_token_ids, encoder.tokenizer.pad_token_id
    pad_id = encoder.end_token_id if pad_id is None else int(pad_id)  # padding is masked, so any token is correct
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    input_ids, mask = pad(prompts, padding_value=pad_id), pad([torch.ones_like(ids) for ids in prompts])
    length = input_ids.shape[1]
    recorder = LogProbs()
    if options.seed is not None:
        if uniforms is None:
            uniforms = streams((options.seed,), batch.rows, batch.max_new_tokens, model.device)
        recorder.sampler = SeededSampling(uniforms, length, options.temperature, options.top_p)
    settings = {"max_new_tokens": batch.max_new_tokens, "eos_token_id": ends, "pad_token_id": pad_id, "use_cache": True}
    settings["no_repeat_ngram_size"] = options.no_repeat_ngram_size  # bans tokens before the sampler chooses one
    config = GenerationConfig(do_sample=False, **settings)  # the sampler, if any, leaves only one token possible
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    saved, model.generation_config = model.generation_config, config  # `generate` reads the unset values from the model
    try:
        with attention_precision(model):
            output = model.generate(**inputs, generation_config=config, logits_processor=[recorder])
    finally:
        model.generation_config = saved
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answers = []
    found = output[:, length:].tolist(), torch.stack(recorder.steps, 1).tolist(), batch.limits
    for generated, log_probs, limit in zip(*found, strict=True):
        new_ids = generated[:limit]
        ids = list(takewhile(lambda id: id not in ends, new_ids))
        count = min(len(ids) + 1, len(new_ids))
        mean = sum(log_probs[:count]) / count
        answers.append(Generated(decode(ids).strip(), ids, len(ids) < len(new_ids), mean))
    return answers


def streams(seed: Sequence[int], rows: Sequence[int], steps: int, device: torch.device) -> Float[Tensor, "batch steps"]:
    """Draw `steps` uniform numbers in [0, 1) for each row; more steps only append numbers."""
    numbers = np.stack([np.random.default_rng((*seed, row)).random(steps) for row in rows])
    return torch.from_numpy(numbers).to(widest_float(device)).to(device)


@dataclass(frozen=True, eq=False)
class SeededSampling:
    """Logits processor that leaves only the token which the row's next uniform number selects."""

    uniforms: Float[Tensor, "batch steps"]
    """One number in [0, 1) for each row and new token."""
    prompt_length: int
    temperature: float
    top_p: float

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return 0 for the chosen token and minus infinity for the others; `scores` are the next token's logits."""
        scores = scores / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(input_ids, scores)
        cumulative = torch.softmax(scores.to(self.uniforms.dtype), dim=-1).cumsum(dim=-1)
        threshold = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        # the first token whose cumulative probability exceeds the threshold, so never a token of probability 0
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@dataclass(eq=False)
class LogProbs:
    """Logits processor that records the log-probability of each next token, greedy or chosen by `sampler`."""

    sampler: SeededSampling | None = None
    steps: list[Float[Tensor, " batch"]] = field(default_factory=list)

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return the scores of the sampler, or `scores`, the logits of the next token, if there is none."""
        left = scores if self.sampler is None else self.sampler(input_ids, scores)
        chosen = scores.gather(1, left.argmax(dim=1, keepdim=True)).squeeze(1)
        self.steps.append(chosen - scores.logsumexp(dim=1))
        return left


def progress_bar(*, disable: bool) -> bars.Progress:
    """Return a progress bar on standard error, with counts, elapsed time and remaining time."""
    extra = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    return bars.Progress(*bars.Progress.get_default_columns(), *extra, console=Console(stderr=True), disable=disable)


def max_positions(model: Any) -> int:
    """Return how many positions the model has embeddings or rotations for; a huge number if it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
