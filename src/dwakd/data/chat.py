"""Render prompts with a model's own chat template, and check that they contain everything that a row contains."""

import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils as clock

from dwakd.data.rows import Example
from dwakd.data.turns import THOUGHTS, Turn, parse_arguments, texts_to_show, write_arguments
from dwakd.errors import UserError

_MARK = "zyxanswerxyz"
_QUESTION = [{"role": "user", "content": "question"}]


class ChatTemplate:
    """Render prompts so that prompt and answer together equal the template's text of the complete conversation.

    The prompt is the template's generation prompt, with its end replaced if other text precedes an answer. Templates
    may ignore `add_generation_prompt`, write a header before an answer that the generation prompt lacks (gpt-oss,
    Qwen3), or begin a reasoning section that the answer does not have (DeepSeek-R1).

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses or changes a simple question and answer.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer_name(tokenizer)
        if not tokenizer.chat_template:
            fix = "use data.template: alpaca, or set student.chat_template_path or teacher.chat_template_path"
            raise UserError(f"data.template is chat, but the tokenizer of {self.name} has no chat template: {fix}")
        self.prints_date = "strftime_now" in str(tokenizer.chat_template)
        self.date = date or clock.datetime.now().date().isoformat()
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._adds_space = bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁")  # SentencePiece
        asked = self._render(_QUESTION, {}, generation=True)
        before, self.tail = self._around_answer(_QUESTION, {})
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, before, strict=False)))
        self._cut, self._header = asked[shared:], before[shared:]

    def prompt(self, example: Example) -> str:
        """Render the text before the answer of a row; refuse a row of which the template omits or changes a part.

        If the row has no answer, an answer of plain text is assumed.
        """
        options = example.options or {}
        turns, asked = self._read(example.turns, options, generation=True)
        self._check_shown(example, turns, asked)
        if example.answer is None:
            prompt = self._before_answer(turns, options, asked, example.response)
        else:
            prompt, _ = self._around_parts(turns, options, asked, example.answer)
        if self._adds_space and prompt != asked and prompt.endswith(" "):
            return prompt[:-1]  # the tokens of the answer begin with this space
        return prompt

    def answer(self, example: Example) -> str:
        """Render the answer of a row that has tool calls or reasoning; refuse it if the template omits a part of it."""
        assert example.answer is not None
        options = example.options or {}
        turns, asked = self._read(example.turns, options, generation=True)
        text = self._around_parts(turns, options, asked, example.answer)[1]
        parts = texts_to_show([example.answer], {}, thoughts=True)
        whole = "\0".join(part for *_, part in parts)
        for _, key, part in parts:
            if not _occurs(part, text, whole.count(part)):
                fix = "write it in the content between <think> and </think>, or remove it" if key in THOUGHTS else ""
                raise self._omits(f"{key!r} of the answer", part, fix)
        return text

    def _read(self, turns: list[Turn], options: dict[str, Any], *, generation: bool = False) -> tuple[list[Turn], str]:
        """Render turns and return them with the text. Arguments of calls are objects, or JSON if the template needs it."""
        parsed: list[dict[str, Any]] = []
        with_objects = parse_arguments(turns, parsed)
        text = self._try(with_objects, options, generation=generation)
        if text is None or any(str(each) in text for each in parsed if each):  # it expects JSON strings
            turns = write_arguments(turns) if text is None else turns
            return turns, self._render(turns, options, generation=generation)
        return with_objects, text

    def _adjusted(self, asked: str) -> str | None:
        """Return a generation prompt with the usual header of an answer; None if it does not end in the usual way."""
        return asked.removesuffix(self._cut) + self._header if asked.endswith(self._cut) else None

    def _around_parts(self, turns: list[Turn], options: dict[str, Any], asked: str, answer: Turn) -> tuple[str, str]:
        """Return the prompt of an answer that has tool calls or reasoning, and the text that the template writes for it.

        The prompt is the longest usual beginning of an answer with which the rendered conversation begins. If the template
        renders earlier turns differently before an answer, the prompt has them as in generation.
        """
        _, full = self._read([*turns, answer], options)
        before, tail = self._around_answer(turns, options)
        adjusted = self._adjusted(asked)
        starts = {
            before.rstrip(): asked,
            before: adjusted or before,
            adjusted or asked: adjusted or asked,
            asked: asked,
        }
        start = max((start for start in starts if full.startswith(start)), key=len, default=None)
        if start is None or not full.endswith(tail):
            what = (
                f"ends it with {full[-20:]!r} instead of {tail!r}"
                if start is not None
                else "changes the text before it"
            )
            raise UserError(
                f"the chat template of {self.name} writes an answer with tool calls or reasoning in another way than an "
                f"answer of text ({what}): remove that row, or change its chat_template_kwargs"
            )
        return starts[start], full[len(start) : len(full) - len(tail)]

    def _before_answer(self, turns: list[Turn], options: dict[str, Any], asked: str, answer: str) -> str:
        adjusted = self._adjusted(asked)
        full = ""
        if answer.strip():
            full = self._render([*turns, {"role": "assistant", "content": answer}], options)
            for start in (asked, adjusted):
                if start is not None and _continues(full, start, answer, self.tail):
                    return start
        before, tail = self._around_answer(turns, options)
        start = _locate(full, asked, before, tail, answer) if full else before
        if start is None:
            fix = "correct that row, or use data.template: alpaca"
            raise UserError(
                f"the chat template of {self.name} changes the text of the answer, so the student would learn a text "
                f"that the template never writes: {fix}"
            )
        if adjusted is None or start.startswith(asked) or asked.startswith(start):
            return start
        return adjusted  # the template renders earlier turns differently before an answer; use them as in generation

    def _around_answer(self, turns: list[Turn], options: dict[str, Any]) -> tuple[str, str]:
        before, *tails = self._render([*turns, {"role": "assistant", "content": _MARK}], options).split(_MARK)
        if len(tails) != 1:
            fix = "correct the chat_template in its tokenizer_config.json, or use data.template: alpaca"
            raise UserError(f"the chat template of {self.name} does not write an assistant's answer unchanged: {fix}")
        return before, tails[0]

    def _check_shown(self, example: Example, turns: list[Turn], asked: str) -> None:
        """Refuse a row with a text that occurs less often in the prompt than in the row.

        Templates drop the reasoning of earlier turns, so it only has to be shown while its turn is the last one.
        """
        options = example.options or {}
        parts = texts_to_show(turns, options)

        def required(num_turns: int) -> str:
            return "\0".join(text for n, key, text in parts if n < num_turns and key not in THOUGHTS)

        whole = required(len(turns))
        for n, key, text in parts:
            shown = _occurs(text, asked, whole.count(text) + (key in THOUGHTS))
            if key in THOUGHTS and not shown:
                alone = self._try(turns[: n + 1], options, generation=False) or ""
                shown = _occurs(text, alone, required(n + 1).count(text) + 1)
            if not shown:
                which = f" of {example.turn_place(n)}" if n >= 0 else ""
                raise self._omits(f"{key!r}{which}", text)

    def _omits(self, what: str, text: str, fix: str = "") -> UserError:
        fix = fix or "remove it from the data, or set chat_template_path to a template that shows it"
        return UserError(f"the chat template of {self.name} omits {what} or a part of it ({text!r:.80}): {fix}")

    def _try(self, turns: list[Turn], options: dict[str, Any], *, generation: bool = True) -> str | None:
        try:
            return self._render(turns, options, generation=generation)
        except UserError:
            return None

    def _render(self, turns: list[Turn], options: dict[str, Any], *, generation: bool = False) -> str:
        apply = self.tokenizer.apply_chat_template
        try:
            with _fixed_clock(self.date):
                text = str(apply(turns, tokenize=False, add_generation_prompt=generation, **options))
            text.encode()
        except Exception as error:  # templates raise any type: jinja2's TemplateError, TypeError, ...
            roles = ", ".join(turn["role"] for turn in turns)
            fix = "change the roles of these messages, or use data.template: alpaca"
            raise UserError(f"the chat template of {self.name} refuses messages of {roles}: {error}; {fix}") from error
        return text


def tokenizer_name(tokenizer: Any) -> str:
    """Return the name of a tokenizer for messages."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer without offsets or without an end-of-sequence token."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer of {name} is slow and has no text offsets; use one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token; set eos_token in tokenizer_config.json")


def _occurs(text: str, rendered: str, times: int) -> bool:
    """Return whether a prompt contains a text this often, literally or escaped as in JSON, Python or HTML strings."""
    if rendered.count(text) >= times:
        return True
    escaped = html.escape(text)
    spellings = {text, repr(text)[1:-1], escaped, escaped.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")}
    for written in (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]):
        spellings |= {written, re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", written)}
    return sum(map(rendered.count, spellings)) >= times


def _continues(full: str, start: str, answer: str, tail: str) -> bool:
    """Return whether a text consists of `start`, the answer (with or without outer white space) and `tail`."""
    if not (full.startswith(start) and full.endswith(tail) and len(full) >= len(start) + len(tail)):
        return False
    return full[len(start) : len(full) - len(tail)] in (answer, answer.rstrip(), answer.lstrip(), answer.strip())


def _locate(full: str, asked: str, before: str, tail: str, answer: str) -> str | None:
    """Find the text before the answer in the rendered conversation `full`; None if the template changes the answer.

    `asked` ends with the generation prompt; `before` and `tail` are the texts around an answer of plain text.
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


@contextmanager
def _fixed_clock(date: str) -> Iterator[None]:
    """Replace the clock of transformers' chat templates by midnight of a date; no argument of transformers does this."""
    saved, clock.datetime = clock.datetime, SimpleNamespace(now=lambda: datetime.fromisoformat(date))
    try:
        yield
    finally:
        clock.datetime = saved
