"""One model on one test set: sampled and greedy answers, their scores, bits per byte, and how they were got."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.data.prompts import render_prompt
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import BitsPerByte, bits_per_byte, length_limit, measurable
from dwakd.evaluation.generate import answer_batches, plan_batches, progress_bar
from dwakd.evaluation.rouge import exact_match, is_scorable, references_of, rouge_l
from dwakd.evaluation.summary import RESAMPLES, Summary, summarise

logger = logging.getLogger(__name__)

SEEDS = (10, 20, 30, 40, 50)
"""The seeds of DSKD's and DWA-KD's evaluation."""


@dataclass(frozen=True)
class Answer:
    """One answer and its scores; a greedy one has no seed."""

    row: int
    seed: int | None
    prompt: str
    answer: str
    references: tuple[str, ...]
    rouge_l: float
    exact_match: float


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate_model`.

    Args:
        rouge_l, exact_match: of the sampled answers, in percent; None without sampling.
        greedy_rouge_l, greedy_exact_match: of the greedy answers, in percent; None without a greedy pass.
        bits_per_byte: of the responses; None if no row has a response.
        num_examples: rows.
        seconds: wall time of the whole evaluation.
        signature: what the numbers depend on besides model and data: metrics, options, seeds, versions.
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
    max_length: int = 512,
    progress: bool = True,
) -> Evaluation:
    """Evaluate by the protocol of DSKD and DWA-KD, with greedy answers and bits per byte beside it.

    Sampling at temperature 1 is noisy, and a small difference between two students may vanish in it; the greedy
    answers and the bits per byte have no such noise.

    Args:
        examples: rows with a response, references, or both; answers are compared with the references if there are
            any, bits per byte are those of the response.
        seeds: one pass of sampling for each.
        do_sample: make the passes of sampling.
        greedy: make a greedy pass.
        temperature, top_p, max_new_tokens, batch_size: see `generate_answers`.
        max_length: tokens of prompt and response in bits per byte.
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
    references = [references_of(example) for example in examples]
    _warn_of_unscorable(references)
    likelihood = None
    max_length = length_limit(model, max_length)
    if measurable(encoder, examples, max_length):
        likelihood = bits_per_byte(model, encoder, examples, max_length=max_length, progress=progress)
    batches = plan_batches(model, encoder, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
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
    return Evaluation(
        rouge_l=_summary(answers, "rouge_l", sampled),
        exact_match=_summary(answers, "exact_match", sampled),
        greedy_rouge_l=_summary(answers, "rouge_l", [None] if greedy else []),
        greedy_exact_match=_summary(answers, "exact_match", [None] if greedy else []),
        bits_per_byte=likelihood,
        num_examples=len(examples),
        seconds=time.perf_counter() - started,
        signature=_signature(
            n=len(examples),
            template=encoder.template,
            seeds=sampled,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            max_length=max_length,
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        answers=tuple(answers),
    )


def write_evaluation(evaluation: Evaluation, json_path: str | Path, answers_path: str | Path | None = None) -> None:
    """Write the numbers with their signature as JSON and, if a path is given, the answers as jsonl.

    A line of the answers has row, seed (null: greedy), prompt, answer, references and scores. Each file appears
    whole or not at all; folders are created as needed.
    """
    if answers_path is not None:
        lines = [json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) for answer in evaluation.answers]
        _write_atomically(answers_path, "\n".join(lines))
    _write_atomically(json_path, json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))


def evaluation_table(rows: Mapping[str, Evaluation]) -> Table:
    """A table of evaluations by name, with their signatures in the caption."""
    table = Table(title="ROUGE-L and exact match in percent", title_justify="left", caption_justify="left")
    table.add_column("model")
    headings = ("ROUGE-L", "95 % interval", "greedy ROUGE-L", "exact match", "greedy exact match", "bits per byte")
    for heading in headings:
        table.add_column(heading, justify="right")
    signatures: dict[str, list[str]] = {}
    for name, evaluation in rows.items():
        rouge = evaluation.rouge_l or evaluation.greedy_rouge_l
        assert rouge is not None, "an evaluation has at least one pass"
        table.add_row(
            name,
            _mean(evaluation.rouge_l),
            f"{rouge.interval[0]:.1f} to {rouge.interval[1]:.1f}",
            _mean(evaluation.greedy_rouge_l),
            _mean(evaluation.exact_match),
            _mean(evaluation.greedy_exact_match),
            "-" if evaluation.bits_per_byte is None else f"{evaluation.bits_per_byte.value:.3f}",
        )
        line = ", ".join(f"{key} {_shown(value)}" for key, value in evaluation.signature.items())
        signatures.setdefault(line, []).append(name)
    one = len(signatures) == 1
    table.caption = "\n".join(line if one else f"{', '.join(names)}: {line}" for line, names in signatures.items())
    return table


def _score(
    encoder: TextEncoder,
    examples: Sequence[Example],
    references: Sequence[tuple[str, ...]],
    seed: int | None,
    texts: Sequence[str],
) -> list[Answer]:
    scores = zip(rouge_l(texts, references), exact_match(texts, references), strict=True)
    return [
        Answer(
            row=example.index,
            seed=seed,
            prompt=render_prompt(example, encoder.template, encoder.tokenizer),
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


def _signature(**options: Any) -> dict[str, Any]:
    packages = ("dwakd", "rouge-score", "torch", "transformers")
    return {
        "metric": "rougeL F1 x 100",
        "stemmer": True,
        "references": "best",
        **options,
        "top_k": 0,
        "sampling": "inverse CDF, one stream per seed and row",
        "bootstrap_resamples": RESAMPLES,
        "versions": {name: version(name) for name in packages},
    }


def _warn_of_unscorable(references: Sequence[tuple[str, ...]]) -> None:
    count = sum(not is_scorable(texts) for texts in references)
    if count:
        logger.warning(
            "ROUGE-L is 0 for %d of %d rows whatever the answer: rouge_score's words are of a-z and 0-9, "
            "and their references have none",
            count,
            len(references),
        )


def _write_atomically(path: str | Path, text: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(target)


def _mean(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    return f"{summary.mean:.2f}" if summary.std is None else f"{summary.mean:.2f} ± {summary.std:.2f}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
