"""One model on one test set: sampled and greedy answers, their scores, bits per byte, and how they were got."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import BitsPerByte, bits_per_byte, length_limit, measurable
from dwakd.evaluation.generate import answer_batches, plan_batches, progress_bar
from dwakd.evaluation.rouge import exact_match, has_reference, is_scorable, references_of, rouge_l
from dwakd.evaluation.signature import data_identity, make_signature, model_identity
from dwakd.evaluation.summary import Summary, summarise

logger = logging.getLogger(__name__)

SEEDS = (10, 20, 30, 40, 50)
"""The seeds of DSKD's and DWA-KD's evaluation."""
MAX_LENGTH = 512
"""Tokens of prompt and response in bits per byte."""


@dataclass(frozen=True)
class Answer:
    """One answer and its scores; a greedy one has no seed, and one without references no scores."""

    row: int
    seed: int | None
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float | None
    exact_match: float | None


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate_model`.

    Args:
        rouge_l, exact_match: of the sampled answers, in percent; None without sampling or without references.
        greedy_rouge_l, greedy_exact_match: of the greedy answers, in percent; None without a greedy pass or without
            references.
        bits_per_byte: of the responses; None if no row has a response and room for it.
        num_examples: rows.
        seconds: wall time of the whole evaluation.
        signature: what the numbers depend on: model, data, metrics, options, seeds, versions.
        answers: every answer; not part of `to_dict`.
    """

    rouge_l: Summary | None
    exact_match: Summary | None
    greedy_rouge_l: Summary | None
    greedy_exact_match: Summary | None
    bits_per_byte: BitsPerByte | None
    num_examples: int
    seconds: float
    signature: dict[str, Any]
    answers: tuple[Answer, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and signature as plain JSON values, without the answers."""
        values = {name: value for name, value in vars(self).items() if name != "answers"}
        return {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in values.items()
        }


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    seeds: Sequence[int] = SEEDS,
    do_sample: bool = True,
    greedy: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    max_length: int = MAX_LENGTH,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate by the protocol of DSKD and DWA-KD, with greedy answers and bits per byte beside it.

    Sampling at temperature 1 is noisy, and a small difference between two students may vanish in it; the greedy
    answers and the bits per byte have no such noise.

    Args:
        examples: rows with a response, references, or both; answers are compared with the references if there are
            any, bits per byte are those of the response. If no row has any, the answers are given without scores.
        seeds: one pass of sampling for each.
        do_sample: make the passes of sampling.
        greedy: make a greedy pass.
        temperature, top_p, max_new_tokens, batch_size: see `generate_answers`.
        max_length: tokens of prompt and response in bits per byte.
        identity: "model" and "data" for the signature, from `model_identity` and `data_identity`; by default found.
        progress: show bars on standard error: bits per byte, then all batches of all passes.

    Raises:
        UserError: no rows, no pass to make, an option out of range, or a row that cannot be scored.
    """
    started = time.perf_counter()
    passes: list[int | None] = [*(seeds if do_sample else ()), *([None] if greedy else [])]
    if not examples:
        raise UserError("the evaluation data has no rows.")
    if not passes or len(set(passes)) < len(passes):
        raise UserError(f"evaluation needs a greedy pass or at least one seed, each once; got seeds {list(seeds)}.")
    scored = any(map(has_reference, examples))
    references = [references_of(example) if scored else () for example in examples]
    if scored:
        _warn_of_unscorable(references)
    batches = plan_batches(model, encoder, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    likelihood = None
    max_length = length_limit(model, max_length)
    if measurable(encoder, examples, max_length):
        likelihood = bits_per_byte(model, encoder, examples, max_length=max_length, progress=progress)
    answers: list[Answer] = []
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task("answers", total=len(batches) * len(passes))
        for seed in passes:
            texts = answer_batches(
                model,
                encoder,
                batches,
                seed=seed,
                temperature=temperature,
                top_p=top_p,
                on_batch=lambda: bar.advance(task),
            )
            answers += _score(encoder, examples, references, seed, texts)
    sampled = [seed for seed in passes if seed is not None]
    greedily: list[int | None] = [None] if greedy else []
    return Evaluation(
        rouge_l=_summary(answers, "rouge_l", sampled if scored else []),
        exact_match=_summary(answers, "exact_match", sampled if scored else []),
        greedy_rouge_l=_summary(answers, "rouge_l", greedily if scored else []),
        greedy_exact_match=_summary(answers, "exact_match", greedily if scored else []),
        bits_per_byte=likelihood,
        num_examples=len(examples),
        seconds=time.perf_counter() - started,
        signature=evaluation_signature(
            model,
            encoder,
            examples,
            seeds=sampled,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            identity=identity,
        ),
        answers=tuple(answers),
    )


def evaluation_signature(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    *,
    seeds: Sequence[int],
    greedy: bool,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    max_length: int = MAX_LENGTH,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The signature that an evaluation with these arguments has (those of `evaluate_model`), known before it runs."""
    found = identity or {"model": model_identity(model), "data": data_identity(examples)}
    date = {} if encoder.printed_date is None else {"template_date": encoder.printed_date}
    parsed = encoder.special_tokens_in_prompts == "parse"
    return {
        **found,
        **date,
        **make_signature(
            **({} if parsed else {"special_tokens_in_prompts": encoder.special_tokens_in_prompts}),
            references="best" if any(map(has_reference, examples)) else "none",
            template=encoder.template,
            seeds=list(seeds),
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            max_length=length_limit(model, max_length),
            dtype=str(model.dtype).removeprefix("torch."),
        ),
    }


def _score(
    encoder: TextEncoder,
    examples: Sequence[Example],
    references: Sequence[tuple[str, ...]],
    seed: int | None,
    texts: Sequence[str],
) -> list[Answer]:
    scores: Any = [(None, None)] * len(texts)
    if any(references):
        scores = zip(rouge_l(texts, references), exact_match(texts, references), strict=True)
    return [
        Answer(
            row=example.index,
            seed=seed,
            prompt=encoder.prompt_text(example),
            answer=text,
            references=expected,
            rouge_l=rouge,
            exact_match=exact,
        )
        for example, expected, text, (rouge, exact) in zip(examples, references, texts, scores, strict=True)
    ]


def _summary(answers: Sequence[Answer], metric: str, seeds: Sequence[int | None]) -> Summary | None:
    if not seeds:
        return None
    return summarise([[getattr(answer, metric) for answer in answers if answer.seed == seed] for seed in seeds])


def _warn_of_unscorable(references: Sequence[tuple[str, ...]]) -> None:
    count = sum(not is_scorable(texts) for texts in references)
    if count:
        logger.warning(
            "ROUGE-L is 0 for %d of %d rows whatever the answer: rouge_score's words are of a-z and 0-9, "
            "and their references have none",
            count,
            len(references),
        )
