"""A model's own chat template: the text before an answer, and whether it shows everything that a row holds."""

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
    """Renders prompts so that prompt and answer together are what the template writes for the whole conversation.

    That is the template's generation prompt, cut or continued where it is not what stands before an answer: templates
    may ignore `add_generation_prompt`, write a header before an answer that they leave to the model (gpt-oss, Qwen3),
    or open a thought that the answer does not have (DeepSeek-R1).

    Args:
        tokenizer: has the template.
        date: ISO date that the template prints as today's; the current date by default.

    Raises:
        UserError: there is no template, or it refuses or alters a plain exchange.
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
        """The text before the answer of one row; of a row without an answer, before an answer of plain text.

        Raises:
            UserError: the template refuses the row, leaves out a part of it, or alters its answer.
        """
        given, options, row = example.turns, example.options or {}, example.index
        parsed: list[dict[str, Any]] = []
        turns: _Turns = parse_arguments(given, parsed)
        asked = self._try(options, turns, generation=True)
        if asked is None or any(str(each) in asked for each in parsed if each):  # it expects strings, prints no JSON
            turns, asked = given, self._render(given, options, row, generation=True)
        self._check_shown(turns, options, asked, row)
        prompt = self._before_answer(turns, options, row, asked, example.response)
        if self._adds_space and prompt != asked and prompt.endswith(" "):
            return prompt[:-1]  # the tokens of the answer begin with it
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
                f"{_name(row)}: the chat template of {self.name} alters the answer, so that the model would learn "
                "another text than the template writes: correct that row, or use data.template: alpaca"
            )
        if adjusted is None or start.startswith(asked) or asked.startswith(start):
            return start
        return adjusted  # earlier turns are written in another way before an answer; read them as in generation

    def _adjusted(self, asked: str) -> str | None:
        """A generation prompt with the end that stands before a plain answer; None if it has another end to replace."""
        if not asked.endswith(self._cut):
            return None
        return asked.removesuffix(self._cut) + self._header

    def _around_answer(self, turns: _Turns, options: dict[str, Any], row: int | None) -> tuple[str, str]:
        text = self._render([*turns, {"role": "assistant", "content": _MARK}], options, row)
        if text.count(_MARK) != 1:
            raise UserError(
                f"the chat template of {self.name} does not write an assistant's answer as it is: correct the "
                "chat_template in its tokenizer_config.json, or use data.template: alpaca"
            )
        before, tail = text.split(_MARK)
        return before, tail

    def _check_shown(self, turns: _Turns, options: dict[str, Any], asked: str, row: int) -> None:
        """Refuse a row with a text that the prompt does not hold as often as the row does.

        Thoughts of earlier turns, which templates drop, need only be shown while their turn is the last one.
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
                    f"{_name(row)}: the chat template of {self.name} leaves out {key!r}{place} or a part of it "
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
        except Exception as error:  # templates raise what they like: jinja2's TemplateError, TypeError, ...
            prefix, what = ("", "a plain exchange") if row is None else (f"{_name(row)}: ", "it")
            raise UserError(
                f"{prefix}the chat template of {self.name} refuses {what}: {error} "
                "(change the roles of that row's messages, or use data.template: alpaca)"
            ) from error
        return text


def _name(row: int) -> str:
    return f"row {row} (counting from 0)"


def _joined(parts: Iterable[tuple[int, str, str]]) -> str:
    """All texts that every prompt has to show."""
    return "\0".join(text for _, key, text in parts if key not in THOUGHTS)


def _occurs(text: str, rendered: str, times: int = 1) -> bool:
    """Whether a text is in a prompt so many times, as it is or as JSON, Python or HTML write it inside a string."""
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
    """The name to call a tokenizer by in a message."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def _continues(full: str, start: str, answer: str, tail: str) -> bool:
    """Whether a text is `start`, the answer, trimmed or not, and `tail`."""
    if not (full.startswith(start) and full.endswith(tail) and len(full) >= len(start) + len(tail)):
        return False
    return full[len(start) : len(full) - len(tail)] in (answer, answer.rstrip(), answer.lstrip(), answer.strip())


def _locate(full: str, asked: str, before: str, tail: str, answer: str) -> str | None:
    """What precedes the answer in a full rendering; None if the template alters the answer.

    Args:
        full: the conversation with the answer.
        asked: the conversation without it and with the generation prompt.
        before, tail: what precedes and follows an answer of plain text.
        answer: of the row.
    """
    for start in (asked, before):
        if _continues(full, start, answer, tail):
            return start
    body = full.removesuffix(tail)
    letters = "".join(answer.split())
    places = [n for n, character in enumerate(body) if not character.isspace()][-len(letters) :]
    if "".join(body[n] for n in places) == letters:  # the header depends on the answer, or white space is altered
        return body[: places[0]]
    rest = body[len(before) :].strip()
    thought = answer.strip().removesuffix(rest).rstrip()
    if not (full.startswith(before) and rest and answer.strip().endswith(rest) and thought.endswith((">", "]"))):
        return None
    opened = asked.removeprefix(before).strip() if asked.startswith(before) else ""
    return asked if opened and not thought.startswith(opened) else before  # a thought that templates leave out


def _adds_space(tokenizer: Any) -> bool:
    """Whether the tokens of any text begin with a space that the text does not have (SentencePiece)."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁")


@contextmanager
def _fixed_clock(date: str | None) -> Iterator[None]:
    """Templates that ask for the time get midnight of this date; transformers lets no argument replace its clock."""
    if date is None:
        yield
        return
    saved = clock.datetime
    clock.datetime = SimpleNamespace(now=lambda: datetime.fromisoformat(date))
    try:
        yield
    finally:
        clock.datetime = saved
