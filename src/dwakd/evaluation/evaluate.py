"""Evaluate one model on one test set: sampled and greedy answers, their scores, and bits per byte."""

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
from dwakd.evaluation.options import DEFAULT_EVALUATION, EvalOptions
from dwakd.evaluation.rouge import exact_match, has_reference, is_scorable, references_of, rouge_l
from dwakd.evaluation.signature import data_identity, make_signature, model_identity
from dwakd.evaluation.summary import Summary, summarise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One answer and its scores. The seed of a greedy answer is None, and so are scores without references."""

    row: int
    seed: int | None
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float | None
    exact_match: float | None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_model`.

    Args:
        rouge_l: ROUGE-L of the sampled answers, in percent; None without sampling or without references.
        exact_match: exact match of the sampled answers, in percent; None in the same cases.
        greedy_rouge_l: ROUGE-L of the greedy answers, in percent; None without a greedy pass or without references.
        greedy_exact_match: exact match of the greedy answers, in percent; None in the same cases.
        bits_per_byte: bits per byte of the responses; None if no row has a response that fits.
        num_examples: number of rows.
        seconds: wall time of the evaluation.
        signature: everything that the numbers depend on: model, data, metrics, options, seeds and versions.
        answers: every answer; `to_dict` leaves them out.
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
        """Return the numbers and the signature as JSON values, without the answers."""
        values = {name: value for name, value in vars(self).items() if name != "answers"}
        return {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in values.items()
        }


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: EvalOptions = DEFAULT_EVALUATION,
    *,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model by the protocol of DSKD and DWA-KD, and also by greedy answers and bits per byte.

    Sampling at temperature 1 is noisy and can hide a small difference between two students. The greedy answers and
    the bits per byte do not have this noise.

    Args:
        model: the model, with or without an adapter.
        encoder: turns rows into prompts and answers into text.
        examples: rows with a response, references or both. Answers are compared with the references, or with the
            response if there are none. Bits per byte are those of the response. If no row has any of these, the
            answers are reported without scores.
        options: seeds, decoding and lengths.
        identity: "model" and "data" of the signature; by default `model_identity` and `data_identity` compute them.
        progress: show progress bars on standard error.

    Raises:
        UserError: there are no rows, only some rows can be scored, or a prompt is empty or too long for the model.
    """
    started = time.perf_counter()
    if not examples:
        raise UserError("the evaluation data has no rows")
    passes = options.passes()
    scored = any(map(has_reference, examples))
    references = [references_of(example) if scored else () for example in examples]
    if scored:
        _warn_of_unscorable(references)
    batches = plan_batches(model, encoder, examples, options)
    likelihood = None
    max_length = length_limit(model, options.max_length)
    if measurable(encoder, examples, max_length):
        likelihood = bits_per_byte(model, encoder, examples, max_length=max_length, progress=progress)
    answers: list[Answer] = []
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task("answers", total=len(batches) * len(passes))
        for generation in passes:
            texts = answer_batches(model, encoder, batches, generation, on_batch=lambda: bar.advance(task))
            answers += _score(encoder, examples, references, generation.seed, texts)
    seeds = [generation.seed for generation in passes] if scored else []
    sampled, greedy = [seed for seed in seeds if seed is not None], [seed for seed in seeds if seed is None]
    return Evaluation(
        rouge_l=_summary(answers, "rouge_l", sampled),
        exact_match=_summary(answers, "exact_match", sampled),
        greedy_rouge_l=_summary(answers, "rouge_l", greedy),
        greedy_exact_match=_summary(answers, "exact_match", greedy),
        bits_per_byte=likelihood,
        num_examples=len(examples),
        seconds=time.perf_counter() - started,
        signature=evaluation_signature(model, encoder, examples, options, identity=identity),
        answers=tuple(answers),
    )


def evaluation_signature(
    model: PreTrainedModel | PeftModel,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: EvalOptions,
    *,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the signature of `evaluate_model` with the same arguments, without running it."""
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
            seeds=[generation.seed for generation in options.passes() if generation.seed is not None],
            greedy=options.greedy,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            max_length=length_limit(model, options.max_length),
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
            "ROUGE-L is 0 for %d of %d rows whatever the answer, because their references contain no letter a-z and no "
            "digit, and rouge_score ignores all other characters",
            count,
            len(references),
        )
