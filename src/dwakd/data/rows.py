"""What one row of a data set means: which columns hold it, and the checked example made from it.

Columns that are not named are looked for in this order: a conversation in `messages` or `conversations`; an
`instruction` with its `input` or `context`, answered in `output`, `response` or `completion`; a `prompt`, answered
in `response`, `completion` or `output`. A column of prompts may itself hold conversations.

Of a conversation the last assistant turn is learnt and everything before it is read, including the columns `tools`,
`documents`, `chat_template_kwargs` and `system` of the row; turns after it are left out. The same columns are read
beside a prompt that is a string. If `messages` ends with the user's or a tool's turn and the row has a `response`,
`completion` or `output`, that is the answer. A completion may be a conversation too: all its turns but the last are
read. Null and empty values mean absent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dwakd.data.turns import check_answer, checked_text, is_conversation, read_options, read_turns
from dwakd.errors import UserError

Row = Mapping[str, Any]
CONVERSATIONS = ("messages", "conversations")
INPUTS = ("input", "context")
RESPONSES = {"instruction": ("output", "response", "completion"), "prompt": ("response", "completion", "output")}
EXTRAS = ("tools", "documents", "chat_template_kwargs", "system")
_ASKING = ("user", "tool", "function", "observation", "function_response", "ipython")


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and what is to be answered.

    Args:
        index: position of the row in its source, from 0.
        instruction: what the user asks; of a conversation, the turn before the answer.
        input: further context, or empty.
        response: the answer to learn, or empty where none is needed.
        references: every acceptable answer, `response` first; empty where there is none.
        history: system text and earlier turns before `instruction`, each {"role": ..., "content": ...} and whatever
            else the turn holds.
        turn: keys of the turn before the answer other than its content; None for a plain user turn.
        options: what else the chat template gets: `tools`, `documents` and the row's `chat_template_kwargs`.
    """

    index: int
    instruction: str
    input: str = ""
    response: str = ""
    references: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    turn: dict[str, Any] | None = None
    options: dict[str, Any] | None = None

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Everything before the answer, as turns of a conversation."""
        content = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [*self.history, {"role": "user", **(self.turn or {}), "content": content}]


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; None where there is none.

    Args:
        optional: whether `response` is read only where the conversation in `prompt` ends without an answer.
    """

    prompt: str
    response: str | None
    input: str | None
    extras: tuple[str, ...] = ()
    optional: bool = False

    @property
    def used(self) -> tuple[str, ...]:
        """The columns to read, each once."""
        named = (self.prompt, self.response, self.input)
        return tuple(dict.fromkeys(name for name in (*named, *self.extras) if name is not None))


def resolve_columns(
    available: Iterable[str],
    source: str,
    *,
    prompt: str | None = None,
    response: str | None = None,
    input: str | None = None,
    need_response: bool = True,
) -> Columns:
    """Find the columns of a source; the module's first lines say how.

    Raises:
        UserError: a named column is not there, or no known one is.
    """
    names = list(available)
    shown = ", ".join(names) or "none"
    for option, name in {"prompt": prompt, "response": response, "input": input}.items():
        if name is not None and name not in names:
            raise UserError(f"{source} has no column {name!r}, which data.{option} names; its columns are: {shown}")
    if prompt is None:
        prompt = next((name for name in (*CONVERSATIONS, *RESPONSES) if name in names), None)
    if prompt is None:
        raise UserError(
            f"{source} has no column with the prompt (messages, conversations, instruction or prompt); its columns "
            f"are: {shown}; name the right one in data.prompt (eval, shrink: --prompt)"
        )
    optional = response is None and prompt in CONVERSATIONS
    if response is None:
        known = RESPONSES.get(prompt, RESPONSES["prompt"])
        response = next((name for name in known if name in names), None)
        if response is None and need_response and not optional:
            raise UserError(
                f"{source} has no column with the response ({', '.join(known)}); its columns are: {shown}; "
                "name the right one in data.response (eval, shrink: --response)"
            )
    if input is None and prompt == "instruction":
        input = next((name for name in INPUTS if name in names), None)
    extras = tuple(name for name in EXTRAS if name in names and name not in (prompt, response, input))
    return Columns(prompt, response, input, extras, optional and response is not None)


def read_example(row: Row, columns: Columns, *, index: int, where: str, need_response: bool) -> Example:
    """The checked example of one row.

    Args:
        row: the row's columns by name.
        columns: those to read.
        index: position of the row in its source.
        where: the place to name in a message, as "data.jsonl, line 17".
        need_response: whether a row without a response is an error.

    Raises:
        UserError: a column is missing in this row or holds something other than text.
    """
    input = "" if columns.input is None or row.get(columns.input) is None else _text(row, columns.input, where)
    turns = _read_prompt(row, columns, where)
    if columns.optional and not (turns and turns[-1]["role"] in _ASKING and row.get(columns.response or "")):
        columns = replace(columns, response=None)
    answer = None
    if columns.response is None and isinstance(row.get(columns.prompt), list):
        turns, answer = _split(turns, columns.prompt, where, need_response)
    if columns.response is not None and is_conversation(row.get(columns.response)):
        *earlier, answer = read_turns(row[columns.response], where, columns.response)
        if answer["role"] != "assistant":
            raise UserError(
                f"{where}: {columns.response!r} ends with a turn of role {answer['role']!r}, not with the assistant's "
                "answer: correct or remove that row"
            )
        if earlier and input:
            turns[-1]["content"] += f"\n{input}"
            input = ""
        turns += earlier
    if not turns or turns[-1]["role"] not in _ASKING:
        found = f"and it has the role {turns[-1]['role']!r}" if turns else "and there is none"
        raise UserError(
            f"{where}: the turn before the answer in {columns.prompt!r} must be the user's or a tool's, {found}: "
            "correct or remove that row"
        )
    if answer is not None:
        check_answer(answer, f"{where}: the last assistant turn", need_response)
        references: tuple[str, ...] = (answer["content"],)
    else:
        references = () if columns.response is None else _read_references(row, columns.response, where, need_response)
    *history, last = turns
    turn = {key: value for key, value in last.items() if key != "content"}
    return Example(
        index=index,
        instruction=last["content"],
        input=input,
        response=references[0] if references else "",
        references=references,
        history=tuple(history),
        turn=None if turn == {"role": "user"} else turn,
        options=read_options(row, columns.extras, where, isinstance(row.get(columns.prompt), list)) or None,
    )


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise UserError(
            f"{where}: the column {column!r} is missing; this row has: {', '.join(map(str, row)) or 'none'}; add it or "
            "remove that row"
        )
    return checked_text(row[column], f"{where}: {column!r}")


def _read_references(row: Row, column: str, where: str, need_response: bool) -> tuple[str, ...]:
    value = row.get(column)
    if value is None and not need_response:
        return ()
    if not isinstance(value, list):
        return (_text(row, column, where),)
    if not value and need_response:
        raise UserError(f"{where}: {column!r} is an empty list: give at least one reference or remove that row")
    return tuple(checked_text(item, f"{where}: {column!r}[{n}]") for n, item in enumerate(value))


def _read_prompt(row: Row, columns: Columns, where: str) -> list[dict[str, Any]]:
    """The turns of the column of prompts, led by the row's system text."""
    asked = row.get(columns.prompt)
    if isinstance(asked, list):
        turns = read_turns(asked, where, columns.prompt)
    else:
        turns = [{"role": "user", "content": _text(row, columns.prompt, where)}]
        if columns.prompt in CONVERSATIONS and (columns.response is None or columns.optional):
            raise UserError(f"{where}: {columns.prompt!r} is a string, not a list of turns with role and content")
    if "system" in columns.extras and (system := row.get("system")):
        turn = {"role": "system", "content": checked_text(system, f"{where}: 'system'")}
        if any(other["role"] == "system" and other != turn for other in turns):
            raise UserError(f"{where}: 'system' and the system turn in {columns.prompt!r} differ: remove one of them")
        turns = [turn, *(other for other in turns if other != turn)]
    return turns


def _split(
    turns: list[dict[str, Any]], column: str, where: str, need_response: bool
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The turns before the answer and, of a conversation that holds it, the answer."""
    if not need_response and not (turns and turns[-1]["role"] == "assistant"):
        return turns, None
    at = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if at < 0:
        raise UserError(f"{where}: {column!r} has no assistant turn to learn: add one or remove that row")
    return turns[:at], turns[at]
