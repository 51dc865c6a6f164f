"""Answers of a teacher to prompts: which are left out and why, and the rows that the others become."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from dwakd.data.rows import Example
from dwakd.errors import UserError
from dwakd.evaluation.metrics import repeated_sequences
from dwakd.recipe.sections import GenerateSection

logger = logging.getLogger(__name__)

# A word, or a single character: a punctuation mark, or a character of Chinese, Japanese or Korean
_WORD = re.compile(r"[^\W぀-ヿ㐀-鿿가-힣]+|\S")
_FILTERS = ("min_characters", "max_characters", "max_repetition", "min_log_prob")


Finish = Literal["end", "cut", "refused"]
"""How an answer ended: by an end token, at `max_new_tokens`, or the teacher could not answer the prompt."""


class Answer(NamedTuple):
    """An answer of a teacher to one prompt."""

    text: str
    num_tokens: int | None  # with the end token; None if an endpoint does not report it
    finish: Finish
    log_prob: float | None  # mean log-probability per token, if it is known


class Collected(NamedTuple):
    """The answers that were kept, as rows and as examples, and how many were left out for each reason."""

    rows: list[dict[str, Any]]
    examples: list[Example]
    left_out: dict[str, int]

    def warn(self, teacher: str) -> None:
        """Warn of the answers that were left out, if there are any."""
        if self.left_out:
            total = sum(self.left_out.values())
            parts = total, len(self.rows) + total, teacher, describe(self.left_out)
            logger.warning("%d of %d answers of %s are left out: %s", *parts)


def repetition(text: str) -> float:
    """Compute the share of sequences of four words that occurred before in the text; 0 if it has at most four words.

    Examples:
        >>> repetition("a b c d e f g")
        0.0
        >>> repetition("a b a b a b a b a b")
        0.7142857142857143
    """
    repeated, total = repeated_sequences(_WORD.findall(text))
    return repeated / max(total, 1)


def fault_of(answer: Answer, options: GenerateSection) -> str | None:
    """Return why an answer is left out: `cut`, `refused`, `empty` or the name of the filter; None if it is kept."""
    length = len(answer.text)
    if answer.finish != "end":
        return answer.finish
    if not length:
        return "empty"
    passed = {
        "min_characters": length >= options.min_characters,
        "max_characters": options.max_characters is None or length <= options.max_characters,
        "max_repetition": options.max_repetition is None or repetition(answer.text) <= options.max_repetition,
        "min_log_prob": options.min_log_prob is None or _log_prob(answer) >= options.min_log_prob,
    }
    return next((name for name in _FILTERS if not passed[name]), None)


def _log_prob(answer: Answer) -> float:
    if answer.log_prob is None:
        raise UserError(
            "the endpoint was not asked for the log-probabilities of these answers: leave out generate.min_log_prob, or "
            "choose another file with --output (generate.output)"
        )
    return answer.log_prob


def collect(
    examples: Sequence[Example], answers: Sequence[Sequence[Answer]], options: GenerateSection, teacher: str
) -> Collected:
    """Turn the answers to each example into rows, without those that are cut, empty or refused by a filter.

    Raises:
        UserError: no answer is left; the message says why.
    """
    layout = _layout(examples)
    rows, kept, faults = [], [], []
    for number, (example, samples) in enumerate(zip(examples, answers, strict=True)):
        for sample, answer in enumerate(samples):
            fault = fault_of(answer, options)
            if fault is None:
                rows.append({
                    **_texts(example, answer.text, layout),
                    "prompt_number": number,
                    "sample": sample,
                    "num_tokens": answer.num_tokens,
                    "log_prob": answer.log_prob,
                })  # fmt: skip
                kept.append(replace(example, response=answer.text, references=(answer.text,)))
            else:
                faults.append(fault)
    if any("chat_template_kwargs" in row for row in rows):
        rows = [
            row | {"chat_template_kwargs": row.get("chat_template_kwargs", {})} for row in rows
        ]  # TRL accepts no null
    counts = Counter(faults)
    left_out = {name: counts[name] for name in ("cut", "refused", "empty", *_FILTERS) if counts[name]}
    if not rows:
        raise UserError(_nothing_left(left_out, options, teacher))
    return Collected(rows, kept, left_out)


def describe(left_out: dict[str, int]) -> str:
    """List how many answers were left out for each reason."""
    names = {
        "cut": "cut at generate.max_new_tokens",
        "refused": "refused: the prompt is too long or invalid, or the server did not complete the answer",
    }
    names |= {name: f"by generate.{name}" for name in _FILTERS}
    return ", ".join(f"{count} {names.get(reason, reason)}" for reason, count in left_out.items())


def _nothing_left(left_out: dict[str, int], options: GenerateSection, teacher: str) -> str:
    total = sum(left_out.values())
    if list(left_out) == ["cut"]:
        return (
            f"all {total} answers of {teacher} reach generate.max_new_tokens={options.max_new_tokens} without an end "
            "token: raise it and choose another file (generate.output), or use a teacher that was trained on this "
            "data.template (chat for an instruct model)"
        )
    if list(left_out) == ["empty"]:
        return f"all {total} answers of {teacher} are empty: use the data.template that it was trained on"
    return f"no answer of {teacher} is left ({describe(left_out)}): change these options"


def _layout(examples: Sequence[Example]) -> Literal["messages", "instruction", "prompt"]:
    """Choose the columns of a file, which are the same for all of its rows."""
    if any(example.history or example.turn or example.options for example in examples):
        return "messages"
    return "instruction" if any(example.input for example in examples) else "prompt"


def _texts(example: Example, answer: str, layout: str) -> dict[str, Any]:
    """Return the columns of prompt and answer, by the names that `load_examples` and TRL both read."""
    if layout == "messages":
        options = dict(example.options or {})
        columns: dict[str, Any] = {name: options.pop(name) for name in ("tools", "documents") if name in options}
        columns |= {"chat_template_kwargs": options} if options else {}
        return {"prompt": example.turns, "completion": [{"role": "assistant", "content": answer}], **columns}
    prompt = example.turns[-1]["content"]  # instruction and input
    own = {"instruction": example.instruction, "input": example.input} if layout == "instruction" else {}
    return {**own, "prompt": prompt, "completion": answer}
