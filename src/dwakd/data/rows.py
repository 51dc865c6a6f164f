"""Find the columns of a data set and convert its rows to checked examples.

Columns that the user does not name are searched in this order: a conversation in `messages` or `conversations`; an
`instruction` with its `input` or `context` and the response in `output`, `response` or `completion`; a `prompt` with
the response in `response`, `completion` or `output`. A prompt may also be a conversation.

The last assistant turn of a conversation is the answer to train on, and everything before it is the prompt, together
with the columns `tools`, `documents`, `chat_template_kwargs` and `system` of the row. Turns after it are ignored. These
columns are also read if the prompt is a string. If `messages` ends with a turn of the user or of a tool and the row has
a `response`, `completion` or `output`, this column is the answer. A completion may also be a conversation: its last
turn is the answer and the others are part of the prompt. Null and empty values are treated as absent.
"""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwakd.data.files import Unusable
from dwakd.data.turns import Turn, check_answer, checked_text, is_object_list, read_options, read_turns, usable
from dwakd.errors import UserError

INVALID_ROWS = ("error", "skip")
_CONVERSATIONS = ("messages", "conversations")
_RESPONSES = {"instruction": ("output", "response", "completion"), "prompt": ("response", "completion", "output")}
_EXTRAS = ("tools", "documents", "chat_template_kwargs", "system")
_ASKING = ("user", "tool", "function", "observation", "function_response", "ipython")


@dataclass(frozen=True)
class Example:
    """A checked row of a data set: a prompt and its response."""

    index: int  # position of the row in its source, from 0
    instruction: str  # the user's request; in a conversation, the content of the turn before the answer
    input: str = ""  # further context
    response: str = ""  # the answer to train on; empty if none is needed
    references: tuple[str, ...] = ()  # all acceptable answers, `response` first
    history: tuple[Turn, ...] = ()  # the system text and the turns before `instruction`, with all their keys
    turn: Turn | None = None  # keys of the turn before the answer except its content; None for a plain user turn
    options: dict[str, Any] | None = None  # arguments of the chat template: tools, documents, chat_template_kwargs

    @property
    def place(self) -> str:
        """The location of the row in its source, for messages."""
        return f"row {self.index} (counting from 0)"

    @property
    def turns(self) -> list[Turn]:
        """All turns of the conversation before the answer."""
        content = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [*self.history, {"role": "user", **(self.turn or {}), "content": content}]

    @property
    def question(self) -> str:
        """The text of the prompt without a template: that of the user, or all turns of a conversation with their roles."""
        turns = self.turns
        if len(turns) == 1:
            return str(turns[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)


@dataclass(frozen=True)
class Columns:
    """The columns of a data set to read. If `optional` is true, `response` is read only if the conversation has no answer."""

    prompt: str
    response: str | None
    input: str | None
    extras: list[str]
    optional: bool
    need_response: bool

    @classmethod
    def find(
        cls, available: Iterable[str], source: str, given: dict[str, str | None], need_response: bool
    ) -> "Columns":
        """Choose the columns. Those `given` as "prompt", "response" or "input" must exist; the others are searched."""
        names = list(available)

        def search(option: str, known: Sequence[str], *, needed: bool) -> str | None:
            name = given[option]
            found = next((each for each in (known if name is None else [name]) if each in names), None)
            if found is None and (needed or name is not None):
                what = f"with the {option} ({', '.join(known)})" if name is None else repr(name)
                fix = f"set data.{option} (eval, shrink: --{option}) to one of them"
                raise UserError(f"{source} has no column {what}; its columns are: {', '.join(names) or 'none'}; {fix}")
            return found

        prompt = search("prompt", (*_CONVERSATIONS, *_RESPONSES), needed=True) or ""
        optional = given["response"] is None and prompt in _CONVERSATIONS
        known = _RESPONSES.get(prompt, _RESPONSES["prompt"])
        response = search("response", known, needed=need_response and not optional)
        input = search("input", ("input", "context") if prompt == "instruction" else (), needed=False)
        extras = [name for name in _EXTRAS if name in names and name not in (prompt, response, input)]
        return cls(prompt, response, input, extras, optional and response is not None, need_response)

    @property
    def used(self) -> list[str]:
        """All columns to read, without repetition."""
        names = dict.fromkeys((self.prompt, self.response, self.input, *self.extras))
        return [name for name in names if name is not None]

    def read(self, row: Any, index: int) -> Example:
        """Convert a row to a checked example. The messages of errors do not name the row."""
        check_row(row)
        row = {column: usable(row.get(column), column) for column in self.used}
        turns, input, references = self._read_texts(row)
        if not _asks(turns):
            found = f"role {turns[-1]['role']!r}" if turns else "none"
            raise UserError(
                f"the turn before the answer in {self.prompt!r} must be the user's or a tool's, not {found}"
            )
        *history, last = turns
        turn = {key: value for key, value in last.items() if key != "content"}
        extras = {name: row[name] for name in self.extras}
        return Example(
            index=index,
            instruction=last["content"],
            input=input,
            response=references[0] if references else "",
            references=references,
            history=tuple(history),
            turn=None if turn == {"role": "user"} else turn,
            options=read_options(extras, is_conversation=isinstance(row.get(self.prompt), list)) or None,
        )

    def _read_texts(self, row: Mapping[str, Any]) -> tuple[list[Turn], str, tuple[str, ...]]:
        """Read the turns before the answer, the further context and the acceptable answers."""
        turns, response = self._read_prompt(row), self.response
        given = row.get(self.input or "")
        input = "" if given is None else checked_text(given, repr(self.input))
        if self.optional and not (_asks(turns) and row.get(response or "")):
            response = None
        value = row.get(response or "")
        if response is None and isinstance(row.get(self.prompt), list):
            at = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
            if not self.need_response and at < len(turns) - 1:
                return turns, input, ()
            if at < 0:
                raise UserError(f"{self.prompt!r} has no assistant turn to train on")
            turns, answer = turns[:at], turns[at]
        elif response is not None and is_object_list(value):
            *earlier, answer = read_turns(value, response)
            if earlier and turns and input:
                turns[-1]["content"] += f"\n{input}"
                input = ""
            turns = [*turns, *earlier]
        else:
            return turns, input, () if response is None else self._read_references(value, repr(response))
        check_answer(answer, f"the answer in {response or self.prompt!r}", self.need_response)
        return turns, input, (answer["content"],)

    def _read_references(self, value: Any, what: str) -> tuple[str, ...]:
        if value is None and not self.need_response:
            return ()
        if value == [] and self.need_response:
            raise UserError(f"{what} is an empty list and needs at least one reference")
        if isinstance(value, list):
            return tuple(checked_text(item, f"{what}[{n}]") for n, item in enumerate(value))
        return (checked_text(value, what),)

    def _read_prompt(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt of a row as turns, with the row's system text as the first turn."""
        asked = row.get(self.prompt)
        if isinstance(asked, list):
            turns = read_turns(asked, self.prompt)
        elif self.prompt in _CONVERSATIONS and (self.response is None or self.optional):
            found = type(asked).__name__
            raise UserError(f"{self.prompt!r} must be a list of turns with role and content, got {found}")
        else:
            turns = [{"role": "user", "content": checked_text(asked, repr(self.prompt))}]
        if "system" in self.extras and (system := row.get("system")):
            turn = {"role": "system", "content": checked_text(system, "'system'")}
            if any(other["role"] == "system" and other != turn for other in turns):
                raise UserError(
                    f"the column 'system' and the system turn in {self.prompt!r} differ: remove one of them"
                )
            turns = [turn, *(other for other in turns if other != turn)]
        return turns


def _asks(turns: list[Turn]) -> bool:
    """Return whether an answer can follow."""
    return bool(turns) and turns[-1]["role"] in _ASKING


def check_row(row: Any) -> None:
    """Refuse a row that is not an object with named columns."""
    if not isinstance(row, Mapping) or not row:
        found = row.reason if isinstance(row, Unusable) else f"{type(row).__name__} {reprlib.repr(row):.40}"
        hint = "; use the suffix .json if the file is one list" if isinstance(row, list) else ""
        raise UserError(f"expected an object with named columns, got {found}{hint}")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse the value of an option that is not one of the choices."""
    if value not in choices:
        raise UserError(f"{option} {value!r} is unknown: use {' or '.join(choices)}")
