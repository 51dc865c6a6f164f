"""A model's own chat template: the text before an answer, and whether it shows everything that a row holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils as clock

from dwakd.data.rows import Example
from dwakd.data.turns import content_keys
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
        self._shown: set[Any] = set()
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
        turns, options, row = example.turns, example.options or {}, example.index
        asked = self._render(turns, options, row, generation=True)
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
                f"the chat template of {self.name} alters the answer of row {row} (counting from 0), so that the model "
                "would learn another text than the template writes: correct that row, or use data.template: alpaca"
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
        """Refuse a row of which the template leaves something out; every kind of turn is tried once."""
        for n, turn in enumerate(turns):
            kind = (turn["role"], frozenset(turn), n == 0, n == len(turns) - 1, bool(turn["content"]))
            if kind in self._shown:
                continue
            for key in (*(["content"] if turn["content"] else []), *content_keys(turn)):
                if not self._is_shown(turns, n, key, options, asked):
                    self._refuse(f"{key!r} of turn {n} (role {turn['role']!r}, counting from 0)", row)
            self._shown.add(kind)
        for key, value in options.items():
            if key in self._shown or isinstance(value, bool):  # switches such as enable_thinking
                continue
            others = {name: other for name, other in options.items() if name != key}
            if self._try(others, turns) == asked:
                self._refuse(f"{key!r}", row)
            self._shown.add(key)

    def _is_shown(self, turns: _Turns, n: int, key: str, options: dict[str, Any], asked: str) -> bool:
        """Whether the text changes with a key, in the conversation or, of thoughts dropped later, up to its turn."""
        turn = dict(turns[n])
        if key == "content":
            turn[key] += _MARK
        else:
            del turn[key]
        if self._try(options, [*turns[:n], turn, *turns[n + 1 :]]) != asked:
            return True
        alone = self._try(options, turns[: n + 1], generation=False)
        return alone is not None and self._try(options, [*turns[:n], turn], generation=False) != alone

    def _refuse(self, what: str, row: int) -> None:
        raise UserError(
            f"the chat template of {self.name} leaves out {what} of row {row} (counting from 0): remove it from the "
            "data, or use a model whose chat template shows it"
        )

    def _try(self, options: dict[str, Any], turns: _Turns, *, generation: bool = True) -> str | None:
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
            where = "a plain exchange" if row is None else f"row {row} (counting from 0)"
            raise UserError(
                f"the chat template of {self.name} refuses {where}: {error} "
                "(change the roles of that row's messages, or use data.template: alpaca)"
            ) from error
        return text


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
