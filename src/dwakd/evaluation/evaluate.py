"""Evaluate one model on one test set: sampled and greedy answers, their scores, bits per byte and calibration."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from dwakd.cache.fingerprint import json_digest, tokenizer_digest
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation import metrics
from dwakd.evaluation.bits_per_byte import BitsPerByte, bits_per_byte, text_encoder
from dwakd.evaluation.generate import Model, answer_passes, answerable_prompts, max_positions
from dwakd.evaluation.options import NO_REPEAT_NGRAM_SIZES, EvalOptions

logger = logging.getLogger(__name__)

_DIGITS = 16
TEXT_METRIC = "bits per byte of text without a prompt"
_PACKAGES = ("dwakd", "rouge-score", "torch", "transformers")


@dataclass(frozen=True)
class Answer:
    """One answer and its scores. `question` is the text of the row without a template, `prompt` is what the model read.

    Seed and temperature of a greedy answer are None, and so are scores without references.
    """

    row: int
    seed: int | None
    temperature: float | None
    question: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float | None
    exact_match: float | None


@dataclass(frozen=True)
class SampledScores:
    """Scores of the answers that were sampled at one temperature, in percent; None without references."""

    rouge_l: metrics.Summary | None
    exact_match: metrics.Summary | None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_model`.

    The first two scores are those of the answers sampled at the first temperature, the next two those of the greedy
    ones, all in percent. They are None without references or without a pass of their kind. The bits per byte are None
    if no row has a response that fits. The signature holds everything that the numbers depend on.
    """

    rouge_l: metrics.Summary | None
    exact_match: metrics.Summary | None
    greedy_rouge_l: metrics.Summary | None
    greedy_exact_match: metrics.Summary | None
    bits_per_byte: BitsPerByte | None
    num_examples: int
    seconds: float
    signature: dict[str, Any]
    other_temperatures: dict[str, SampledScores] = field(default_factory=dict)
    """Scores at the temperatures after the first, by temperature."""
    answers: tuple[Answer, ...] = field(default=(), repr=False)

    @property
    def is_text(self) -> bool:
        """Whether this is the result of `evaluate_text`."""
        return bool(self.signature["metric"] == TEXT_METRIC)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers and the signature as JSON values, without the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def evaluate_model(
    model: Model,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: EvalOptions | None = None,
    *,
    signature: dict[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model by the protocol of DSKD and DWA-KD, and also by greedy answers, bits per byte and calibration.

    Sampling at temperature 1 is noisy and can hide a small difference between two students. The greedy answers and
    the bits per byte do not have this noise.

    Args:
        examples: answers are compared with the references of a row, or else with its response, whose bits per byte are
            computed. If no row has any of these, the answers are reported without scores.
        options: by default, those of the protocol.
        signature: result of `evaluation_signature`, if the caller has computed it already.

    Raises:
        UserError: there are no rows, only some rows can be scored, or a prompt is empty or too long for the model.
    """
    started = time.perf_counter()
    options = options or EvalOptions()
    if not examples:
        raise UserError("the evaluation data has no rows")
    examples = [encoder.with_response(example) for example in examples]
    scored = any(map(metrics.has_reference, examples))
    references = [metrics.references_of(example) if scored else () for example in examples]
    if scored and (count := sum(not metrics.is_scorable(texts) for texts in references)):
        reason = "rouge_score reads only letters a-z and digits, which their references do not contain"
        logger.warning("ROUGE-L is 0 for %d of %d rows whatever the answer: %s", count, len(references), reason)
    answerable_prompts(model, encoder, examples)  # raises before anything is computed
    likelihood = bits_per_byte(model, encoder, examples, max_length=options.max_length, progress=progress)
    answers: list[Answer] = []
    passes = options.passes()
    for one, texts in zip(passes, answer_passes(model, encoder, examples, passes, progress=progress), strict=True):
        scores: Any = [(None, None)] * len(texts)
        if scored:
            scores = zip(metrics.rouge_l(texts, references), metrics.exact_match(texts, references), strict=True)
        temperature = None if one.seed is None else one.temperature
        answers += [
            Answer(
                example.index,
                one.seed,
                temperature,
                example.question,
                encoder.prompt_text(example),
                text,
                expected,
                *pair,
            )
            for example, text, expected, pair in zip(examples, texts, references, scores, strict=True)
        ]

    def summary(metric: str, temperature: float | None) -> metrics.Summary | None:
        table: dict[int | None, list[float]] = {}
        for answer in answers:
            if answer.temperature == temperature:
                table.setdefault(answer.seed, []).append(getattr(answer, metric))
        return metrics.summarise([*table.values()]) if scored and table else None

    first, *others = options.temperatures
    return Evaluation(
        rouge_l=summary("rouge_l", first),
        exact_match=summary("exact_match", first),
        greedy_rouge_l=summary("rouge_l", None),
        greedy_exact_match=summary("exact_match", None),
        other_temperatures={str(t): SampledScores(summary("rouge_l", t), summary("exact_match", t)) for t in others},
        bits_per_byte=likelihood,
        num_examples=len(examples),
        seconds=time.perf_counter() - started,
        signature=signature or evaluation_signature(model, encoder, examples, options),
        answers=tuple(answers),
    )


def evaluate_text(
    model: Model,
    encoder: TextEncoder,
    texts: Sequence[Example],
    options: EvalOptions,
    *,
    signature: dict[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compute bits per byte and calibration of the responses of `texts` without a prompt, and no answers.

    `signature` is the result of `text_signature`, if the caller has computed it already.
    """
    started = time.perf_counter()
    own = text_encoder(encoder.tokenizer)
    likelihood = bits_per_byte(model, own, texts, max_length=options.max_length, progress=progress)
    signature = signature or text_signature(model, encoder, texts, options)
    return Evaluation(None, None, None, None, likelihood, len(texts), time.perf_counter() - started, signature)


def text_signature(
    model: Model,
    encoder: TextEncoder,
    texts: Sequence[Example],
    options: EvalOptions,
    weights: dict[str, Any] | None = None,
    source: str = "rows in memory",
) -> dict[str, Any]:
    """Return everything that the result of `evaluate_text` depends on; see `evaluation_signature`."""
    full = evaluation_signature(model, encoder, texts, options, weights, source)
    names = ("model", "data", "tokenizer", "max_length", "dtype", "device", "versions")
    return {"metric": TEXT_METRIC, **{name: full[name] for name in names if name in full}}


def evaluation_signature(
    model: Model,
    encoder: TextEncoder,
    examples: Sequence[Example],
    options: EvalOptions,
    weights: dict[str, Any] | None = None,
    source: str = "rows in memory",
) -> dict[str, Any]:
    """Return everything that the result of `evaluate_model` depends on.

    `weights` is the result of `model_identity`, if the caller has computed it already; `source` is the name of the rows.
    """
    special, temperatures = encoder.special_tokens_in_prompts, options.temperatures
    ngram_size = NO_REPEAT_NGRAM_SIZES[options.decoding]
    return {
        "model": weights or model_identity(model),
        "data": data_identity(examples, source),
        **({} if encoder.printed_date is None else {"template_date": encoder.printed_date}),
        "metric": "rougeL F1 x 100",
        "stemmer": True,
        **({} if special == "parse" else {"special_tokens_in_prompts": special}),
        "references": "best" if any(map(metrics.has_reference, examples)) else "none",
        "template": encoder.template,
        **(
            {"chat_template": json_digest(encoder.tokenizer.chat_template)[:_DIGITS]}
            if encoder.template == "chat"
            else {}
        ),
        **({} if encoder.bos == "auto" else {"bos": encoder.bos}),
        "tokenizer": tokenizer_digest(encoder)[:_DIGITS],
        "seeds": [*dict.fromkeys(one.seed for one in options.passes() if one.seed is not None)],
        "greedy": options.greedy,
        "temperature": temperatures if len(temperatures) > 1 else temperatures[0],
        "top_p": options.top_p,
        **({"no_repeat_ngram_size": ngram_size} if ngram_size else {}),
        "max_new_tokens": options.max_new_tokens,
        "max_length": min(options.max_length, max_positions(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({} if model.device.type == "cpu" else {"device": model.device.type}),
        "top_k": 0,
        "sampling": "inverse CDF, one stream per seed and row",
        "bootstrap_resamples": metrics.RESAMPLES,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def model_identity(model: Model, name: str | None = None) -> dict[str, Any]:
    """Return the model's name, its hub revision (None for a folder) and the first 16 digits of its weights' SHA-256."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    name = name or model.config.name_or_path or type(model).__name__
    revision = getattr(model.config, "_commit_hash", None)
    return {"name": name, "revision": revision, "sha256": digest.hexdigest()[:_DIGITS]}


def data_identity(examples: Sequence[Example], name: str = "rows in memory") -> dict[str, Any]:
    """Return the name of the rows, their number and the first 16 digits of the SHA-256 of their texts."""
    rows = [{key: value for key, value in asdict(example).items() if value is not None} for example in examples]
    for row in rows:
        del row["is_conversation"]  # not in the digests of version 0.2
    digest = hashlib.sha256(json.dumps(rows, default=str).encode())
    return {"name": name, "rows": len(examples), "sha256": digest.hexdigest()[:_DIGITS]}
