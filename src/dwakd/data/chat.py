"""Render prompts with a model's own chat template, and check that they contain everything that a row contains."""

import html
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils as clock

from dwakd.data.rows import Example
from dwakd.data.turns import THOUGHTS, parse_arguments, texts_to_show
from dwakd.errors import UserError

_MARK = "zyxanswerxyz"
_QUESTION = [{"role": "user", "content": "question"}]
_Turns = list[dict[str, Any]]


class ChatTemplate:
    """Render prompts so that prompt and answer together equal the template's text of the complete conversation.

    The prompt is the template's generation prompt, with its end replaced if other text precedes an answer. Templates
    may ignore `add_generation_prompt`, write a header before an answer that the generation prompt lacks (gpt-oss,
    Qwen3), or begin a reasoning section that the answer does not have (DeepSeek-R1).

    Args:
        tokenizer: the tokenizer with the chat template.
        date: ISO date that the template prints as today's date. Default: the current date.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses or changes a simple question and answer.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer_name(tokenizer)
        if not tokenizer.chat_template:
            raise UserError(
                f"data.template is chat, but the tokenizer of {self.name} has no chat template: "
                "use data.template: alpaca, or add a chat_template to its tokenizer_config.json"
            )
        self.prints_date = "strftime_now" in str(tokenizer.chat_template)
        self.date = date or clock.datetime.now().date().isoformat()
        self._adds_space = _adds_space(tokenizer)
        asked = self._render(_QUESTION, {}, None, generation=True)
        before, self.tail = self._around_answer(_QUESTION, {}, None)
        shared = next(
            (n for n, (a, b) in enumerate(zip(asked, before, strict=False)) if a != b), min(len(asked), len(before))
        )
        self._cut, self._header = asked[shared:], before[shared:]

    def prompt(self, example: Example) -> str:
        """Render the text before the answer of a row. If the row has no answer, assume an answer of plain text.

        Raises:
            UserError: the template refuses the row, omits a part of it, or changes its answer.
        """
        given, options, row = example.turns, example.options or {}, example.index
        parsed: list[dict[str, Any]] = []
        turns: _Turns = parse_arguments(given, parsed)
        asked = self._try(options, turns, generation=True)
        if asked is None or any(str(each) in asked for each in parsed if each):  # it expects JSON strings
            turns, asked = given, self._render(given, options, row, generation=True)
        self._check_shown(turns, options, asked, row)
        prompt = self._before_answer(turns, options, row, asked, example.response)
        if self._adds_space and prompt != asked and prompt.endswith(" "):
            return prompt[:-1]  # the tokens of the answer begin with this space
        return prompt

    def _before_answer(self, turns: _Turns, options: dict[str, Any], row: int, asked: str, answer: str) -> str:
        full, adjusted = "", self._adjusted(asked)
        if answer.strip():
            full = self._render([*turns, {"role": "assistant", "content": answer}], options, row)
            for start in (asked, adjusted):
                if start is not None and _continues(full, start, answer, self.tail):
                    return start
        before, tail = self._around_answer(turns, options, row)
        start = _locate(full, asked, before, tail, answer) if full else before
        if start is None:
            raise UserError(
                f"{_name(row)}: the chat template of {self.name} changes the answer, so that the model would be "
                "trained on a text that the template does not write: correct that row, or use data.template: alpaca"
            )
        if adjusted is None or start.startswith(asked) or asked.startswith(start):
            return start
        return adjusted  # the template renders earlier turns differently before an answer; use them as in generation

    def _adjusted(self, asked: str) -> str | None:
        """Replace the end of a generation prompt by the text before a plain answer; None if the end is not the usual."""
        if not asked.endswith(self._cut):
            return None
        return asked.removesuffix(self._cut) + self._header

    def _around_answer(self, turns: _Turns, options: dict[str, Any], row: int | None) -> tuple[str, str]:
        text = self._render([*turns, {"role": "assistant", "content": _MARK}], options, row)
        if text.count(_MARK) != 1:
            raise UserError(
                f"the chat template of {self.name} does not write an assistant's answer unchanged: correct the "
                "chat_template in its tokenizer_config.json, or use data.template: alpaca"
            )
        before, tail = text.split(_MARK)
        return before, tail

    def _check_shown(self, turns: _Turns, options: dict[str, Any], asked: str, row: int) -> None:
        """Refuse a row with a text that occurs less often in the prompt than in the row.

        Templates drop the reasoning of earlier turns, so it only has to be shown while its turn is the last one.

        Raises:
            UserError: the template omits a text.
        """
        parts = list(texts_to_show(turns, options))
        whole = _joined(parts)
        for n, key, text in parts:
            if key not in THOUGHTS:
                shown = _occurs(text, asked, whole.count(text))
            else:
                alone = self._try(options, turns[: n + 1]) or ""
                until = _joined(part for part in parts if part[0] <= n)
                shown = any(_occurs(text, a, b.count(text) + 1) for a, b in ((asked, whole), (alone, until)))
            if not shown:
                place = f" of turn {n} (role {turns[n]['role']!r}, counting from 0)" if n >= 0 else ""
                raise UserError(
                    f"{_name(row)}: the chat template of {self.name} omits {key!r}{place} or a part of it "
                    f"({text!r:.80}): remove it from the data, or use a model whose chat template shows it"
                )

    def _try(self, options: dict[str, Any], turns: _Turns, *, generation: bool = False) -> str | None:
        try:
            return self._render(turns, options, None, generation=generation)
        except UserError:
            return None

    def _render(self, turns: _Turns, options: dict[str, Any], row: int | None, *, generation: bool = False) -> str:
        try:
            with _fixed_clock(self.date if self.prints_date else None):
                text = str(
                    self.tokenizer.apply_chat_template(
                        turns, tokenize=False, add_generation_prompt=generation, **options
                    )
                )
            text.encode()
        except Exception as error:  # templates raise any type: jinja2's TemplateError, TypeError, ...
            prefix, what = ("", "a simple question and answer") if row is None else (f"{_name(row)}: ", "the row")
            raise UserError(
                f"{prefix}the chat template of {self.name} refuses {what}: {error}; "
                "change the roles of that row's messages, or use data.template: alpaca"
            ) from error
        return text


def _name(row: int) -> str:
    return f"row {row} (counting from 0)"


def _joined(parts: Iterable[tuple[int, str, str]]) -> str:
    """Join all texts that every prompt must contain."""
    return "\0".join(text for _, key, text in parts if key not in THOUGHTS)


def _occurs(text: str, rendered: str, times: int = 1) -> bool:
    """Return whether a prompt contains a text this often, literally or escaped as in JSON, Python or HTML strings."""
    if rendered.count(text) >= times:
        return True
    spellings = {
        text,
        repr(text)[1:-1],
        html.escape(text),
        html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    }
    for written in (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]):
        spellings |= {written, re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", written)}
    return sum(map(rendered.count, spellings)) >= times


def tokenizer_name(tokenizer: Any) -> str:
    """Return the name of a tokenizer for messages."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def _continues(full: str, start: str, answer: str, tail: str) -> bool:
    """Return whether a text consists of `start`, the answer (with or without outer white space) and `tail`."""
    if not (full.startswith(start) and full.endswith(tail) and len(full) >= len(start) + len(tail)):
        return False
    return full[len(start) : len(full) - len(tail)] in (answer, answer.rstrip(), answer.lstrip(), answer.strip())


def _locate(full: str, asked: str, before: str, tail: str, answer: str) -> str | None:
    """Find the text before the answer in a rendered conversation; None if the template changes the answer.

    Args:
        full: the rendered conversation with the answer.
        asked: the rendered conversation without the answer and with the generation prompt.
        before: the text before an answer of plain text.
        tail: the text after an answer of plain text.
        answer: the answer of the row.
    """
    for start in (asked, before):
        if _continues(full, start, answer, tail):
            return start
    body = full.removesuffix(tail)
    letters = "".join(answer.split())
    places = [n for n, character in enumerate(body) if not character.isspace()][-len(letters) :]
    if "".join(body[n] for n in places) == letters:  # the header depends on the answer, or white space changed
        return body[: places[0]]
    rest = body[len(before) :].strip()
    thought = answer.strip().removesuffix(rest).rstrip()
    if not (full.startswith(before) and rest and answer.strip().endswith(rest) and thought.endswith((">", "]"))):
        return None
    opened = asked.removeprefix(before).strip() if asked.startswith(before) else ""
    return asked if opened and not thought.startswith(opened) else before  # reasoning that the template omits


def _adds_space(tokenizer: Any) -> bool:
    """Return whether the tokens of any text begin with a space that the text does not have (SentencePiece)."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁")


@contextmanager
def _fixed_clock(date: str | None) -> Iterator[None]:
    """Replace the clock of transformers' chat templates by midnight of a date; no argument of transformers does this."""
    if date is None:
        yield
        return
    saved = clock.datetime
    clock.datetime = SimpleNamespace(now=lambda: datetime.fromisoformat(date))
    try:
        yield
    finally:
        clock.datetime = saved
