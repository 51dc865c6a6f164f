"""Find the columns of a data set and convert its rows to checked examples.

Columns that the user does not name are searched in this order: a conversation in `messages` or `conversations`; an
`instruction` with its `input` or `context` and the response in `output`, `response` or `completion`; a `prompt` with
the response in `response`, `completion` or `output`. A prompt may also be a conversation.

The last assistant turn of a conversation is the answer to train on, and everything before it is the prompt, together
with the columns `tools`, `documents`, `chat_template_kwargs` and `system` of the row. Turns after it are ignored. These
columns are also read if the prompt is a string. If `messages` ends with a turn of the user or of a tool and the row has
a `response`, `completion` or `output`, this column is the answer. A completion may also be a conversation: its last
turn is the answer and the others are part of the prompt. Null and empty values are treated as absent.

With `supervise: all`, each assistant turn of `messages`, or of a completion, becomes a separate example, whose prompt
is everything before it. Turns whose weight is 0 are context only.
"""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dwakd.data.files import Unusable
from dwakd.data.turns import (
    Turn,
    check_answer,
    checked_text,
    content_keys,
    is_object_list,
    is_trained,
    read_options,
    read_turns,
    usable,
)
from dwakd.errors import UserError

INVALID_ROWS = ("error", "skip")
SUPERVISE = ("last", "all")
_CONVERSATIONS = ("messages", "conversations")
_RESPONSES = {"instruction": ("output", "response", "completion"), "prompt": ("response", "completion", "output")}
_EXTRAS = ("tools", "documents", "chat_template_kwargs", "system")
_ASKING = ("user", "tool", "function", "observation", "function_response", "ipython")


@dataclass(frozen=True)
class Example:
    """A checked row of a data set: a prompt and its response."""

    index: int  # position of the row in its source, from 0; with `supervise: all`, the number of the example
    instruction: str  # the user's request; in a conversation, the content of the turn before the answer
    input: str = ""  # further context
    response: str = ""  # the answer to train on; empty if none is needed
    references: tuple[str, ...] = ()  # all acceptable answers, `response` first
    history: tuple[Turn, ...] = ()  # the system text and the turns before `instruction`, with all their keys
    turn: Turn | None = None  # keys of the turn before the answer except its content; None for a plain user turn
    options: dict[str, Any] | None = None  # arguments of the chat template: tools, documents, chat_template_kwargs
    answer: Turn | None = None  # the answer, if it has tool calls or reasoning; the student's template writes its text
    teacher_turns: tuple[Turn, ...] | None = None  # the prompt of the teachers, if it is not the student's
    teacher: str | None = None  # name of the only teacher of the row, if it has only one
    source: tuple[int, int] | None = None  # with `supervise: all`, row and turn in the source
    moved: int = 0  # number of turns that the column `system` puts before those of the conversation
    is_conversation: bool = field(default=False, compare=False)  # whether the row has its prompt as a list of turns

    @property
    def place(self) -> str:
        """The location of the row in its source, for messages."""
        if self.source is None:
            return f"row {self.index} (counting from 0)"
        return "row {}, turn {} (counting from 0)".format(*self.source)

    def turn_place(self, number: int) -> str:
        """The location of a turn in its row, for messages."""
        if number < self.moved:
            return "the column 'system'"
        return f"turn {number - self.moved} (role {self.turns[number]['role']!r}, counting from 0)"

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

    def for_teacher(self) -> "Example":
        """Return the row as teachers read it: with the prompt that only they see, if it has one."""
        turns = self.teacher_turns
        return self if turns is None else replace(self, **_before_answer(turns), input="", teacher_turns=None, moved=0)


@dataclass(frozen=True)
class Columns:
    """The columns of a data set to read. If `optional` is true, `response` is read only if the conversation has no answer."""

    prompt: str
    response: str | None
    input: str | None
    teacher_prompt: str | None
    teacher_key: str | None
    extras: list[str]
    optional: bool
    need_response: bool
    supervise: str

    @classmethod
    def find(
        cls,
        available: Iterable[str],
        source: str,
        given: dict[str, str | None],
        need_response: bool,
        supervise: str = "last",
    ) -> "Columns":
        """Choose the columns. Those `given` as options of the section data must exist; the others are searched."""
        names = list(available)

        def search(option: str, known: Sequence[str], *, needed: bool) -> str | None:
            name = given.get(option)
            found = next((each for each in (known if name is None else [name]) if each in names), None)
            if found is None and (needed or name is not None):
                what = f"with the {option} ({', '.join(known)})" if name is None else repr(name)
                fix = _fix_columns(option, names, known if name is None else [name])
                raise UserError(f"{source} has no column {what}; its columns are: {', '.join(names) or 'none'}; {fix}")
            return found

        prompt = search("prompt", (*_CONVERSATIONS, *_RESPONSES), needed=True) or ""
        optional = given["response"] is None and prompt in _CONVERSATIONS
        known = _RESPONSES.get(prompt, _RESPONSES["prompt"])
        response = search("response", known, needed=need_response and not optional)
        input = search("input", ("input", "context") if prompt == "instruction" else (), needed=False)
        teacher_prompt = search("teacher_prompt", (), needed=False)
        if teacher_prompt is not None and supervise == "all":
            raise UserError("data.teacher_prompt replaces the prompt of one answer: set data.supervise: last")
        teacher_key = search("teacher_key", (), needed=False)
        extras = [name for name in _EXTRAS if name in names and name not in (prompt, response, input, teacher_prompt)]
        optional = optional and response is not None
        return cls(prompt, response, input, teacher_prompt, teacher_key, extras, optional, need_response, supervise)

    @property
    def used(self) -> list[str]:
        """All columns to read, without repetition."""
        names = dict.fromkeys(
            (self.prompt, self.response, self.input, self.teacher_prompt, self.teacher_key, *self.extras)
        )
        return [name for name in names if name is not None]

    def read(self, row: Any, index: int) -> list[Example]:
        """Convert a row to checked examples, one for each answer. The messages of errors do not name the row."""
        check_row(row)
        row = {column: usable(row.get(column), column) for column in self.used}
        turns, first, references = self._conversation(row)
        ends = self._answers(turns, first)
        given = row.get(self.input or "")
        input = "" if given is None else checked_text(given, repr(self.input))
        asked = (first or ends[0]) - 1  # the turn that the further context belongs to
        if input and asked >= 0 and ends != [asked + 1]:
            turns[asked]["content"] += f"\n{input}"
            input = ""
        is_conversation = isinstance(row.get(self.prompt), list)
        options = read_options({name: row[name] for name in self.extras}, is_conversation=is_conversation) or None
        private, column = row.get(self.teacher_prompt or ""), self.teacher_prompt or ""
        teacher_turns = tuple(_read_prompt(private, column)) if private else None
        if teacher_turns is not None:
            self._check_asks(teacher_turns, column)
        teacher = None
        if self.teacher_key is not None:
            value = row[self.teacher_key]
            teacher = checked_text(str(value) if type(value) is int else value, repr(self.teacher_key)).strip()
        found, moved = [], self._moved(row)
        same: dict[str, Any] = {"input": input, "options": options, "moved": moved, "teacher": teacher}
        same |= {"teacher_turns": teacher_turns, "is_conversation": is_conversation}
        for end in ends:
            self._check_asks(turns[:end], self.prompt, moved)
            source = (index, end - moved) if self.supervise == "all" else None
            example = Example(index, **_before_answer(turns[:end]), **same, source=source)
            if end < len(turns):
                answer = turns[end]
                check_answer(answer, f"the answer in {self.response or self.prompt!r}", self.need_response)
                accepted = references if references and end == len(turns) - 1 else (answer["content"],)
                kept = answer if content_keys(answer) else None
                example = replace(example, response=accepted[0], references=accepted, answer=kept)
            found.append(example)
        return found

    def _conversation(self, row: Mapping[str, Any]) -> tuple[list[Turn], int, tuple[str, ...]]:
        """Read all turns of a row with its answer as the last one, the first that may be trained, and references."""
        turns, response = self._read_turns(row), self.response
        if self.optional and not (_asks(turns) and row.get(response or "")):
            response = None
        first = 0 if isinstance(row.get(self.prompt), list) and (response is None or self.optional) else len(turns)
        if response is None:
            return turns, first, ()
        value = row.get(response)
        if is_object_list(value):
            completion = read_turns(value, response)
            if (role := completion[-1]["role"]) != "assistant":
                raise UserError(f"the answer in {response!r} must be an assistant turn, got a turn of role {role!r}")
            return [*turns, *completion], first, ()
        references = self._read_references(value, repr(response))
        return [*turns, *({"role": "assistant", "content": text} for text in references[:1])], first, references

    def _answers(self, turns: list[Turn], first: int) -> list[int]:
        """Return the positions of the answers to train on; the number of turns stands for one that does not exist."""
        found = [n for n, turn in enumerate(turns) if n >= first and turn["role"] == "assistant"]
        unanswered = [len(turns)] if turns and not self.need_response and found[-1:] != [len(turns) - 1] else []
        trained = [n for n in found if is_trained(turns[n])]
        found = trained + unanswered if self.supervise == "all" else unanswered or found[-1:]
        if not found:
            raise UserError(f"{self.prompt!r} has no assistant turn to train on")
        return found

    def _moved(self, row: Mapping[str, Any]) -> int:
        """Return 1 if the system text of a row precedes the turns of its conversation, which are counted without it."""
        asked = row.get(self.prompt)
        if not ("system" in self.extras and row.get("system") and asked and isinstance(asked, list)):
            return 0
        return int(read_turns(asked[:1], self.prompt)[0]["role"] != "system")

    def _check_asks(self, turns: Sequence[Turn], column: str, moved: int = 0) -> None:
        if not _asks(turns):
            found = f"role {turns[-1]['role']!r}" if turns else "none"
            fix = (
                f"; give turn {len(turns) - moved} the weight 0 if it is context only"
                if self.supervise == "all"
                else ""
            )
            raise UserError(
                f"the turn before the answer in {column!r} must be the user's or a tool's, not {found}{fix}"
            )

    def _read_references(self, value: Any, what: str) -> tuple[str, ...]:
        if value is None and not self.need_response:
            return ()
        if value == [] and self.need_response:
            raise UserError(f"{what} is an empty list and needs at least one reference")
        if isinstance(value, list):
            return tuple(checked_text(item, f"{what}[{n}]") for n, item in enumerate(value))
        return (checked_text(value, what),)

    def _read_turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """Read the prompt of a row as turns, with the row's system text as the first turn."""
        asked = row.get(self.prompt)
        if self.prompt in _CONVERSATIONS and (self.response is None or self.optional) and not isinstance(asked, list):
            found = type(asked).__name__
            raise UserError(f"{self.prompt!r} must be a list of turns with role and content, got {found}")
        turns = _read_prompt(asked, self.prompt)
        if "system" in self.extras and (system := row.get("system")):
            turn = {"role": "system", "content": checked_text(system, "'system'")}
            if any(other["role"] == "system" and other != turn for other in turns):
                raise UserError(
                    f"the column 'system' and the system turn in {self.prompt!r} differ: remove one of them"
                )
            turns = [turn, *(other for other in turns if other != turn)]
        return turns


def _fix_columns(option: str, names: Sequence[str], known: Sequence[str]) -> str:
    """Return how to correct a data set that has none of the columns `known`."""
    if near := next((name for name in names if name.strip().lower() in known), None):
        return f"rename {near!r} to {near.strip().lower()!r}, or set data.{option} ({option}_column in Python)"
    if len(names) == 1 and (mark := next((mark for mark in (";", "\t", "|") if mark in names[0]), None)):
        return f"separate the columns of the file by commas, not by {mark!r}"
    if option == "prompt" and "text" in names:
        fix = "only responses to prompts are trained: write 'prompt' and 'response', or 'messages', instead of 'text'"
        return f"{fix}; dwakd eval scores such texts with --text"
    chosen = f"set data.{option} (--{option} of eval and shrink, {option}_column in Python) to one of them"
    return chosen if option != "response" else f"{chosen}, or let the teacher answer with data.responses: teacher"


def _read_prompt(value: Any, column: str) -> list[Turn]:
    """Read a prompt that is a conversation or a text as turns."""
    if isinstance(value, list):
        return read_turns(value, column)
    return [{"role": "user", "content": checked_text(value, repr(column))}]


def _before_answer(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the fields of an example for the turns before its answer."""
    *history, last = turns
    turn = {key: value for key, value in last.items() if key != "content"}
    plain = turn == {"role": "user"}
    return {"instruction": last["content"], "history": tuple(history), "turn": None if plain else turn}


def _asks(turns: Sequence[Turn]) -> bool:
    """Return whether an answer can follow."""
    return bool(turns) and turns[-1]["role"] in _ASKING


def check_row(row: Any) -> None:
    """Refuse a row that is not an object with named columns."""
    if not isinstance(row, Mapping) or not row:
        found = row.reason if isinstance(row, Unusable) else f"{type(row).__name__} {reprlib.repr(row):.40}"
        hint = "; use the suffix .json if the file is one list" if isinstance(row, list) else ""
        raise UserError(f"expected an object with named columns, got {found}{hint}")
