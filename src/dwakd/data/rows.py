"""What one row of a data set means: which columns hold it, and the checked example made from it.

Columns that are not named are looked for in this order: a conversation in `messages` or `conversations`; an
`instruction` with its `input` or `context`, answered in `output`, `response` or `completion`; a `prompt`, answered
in `response`, `completion` or `output`. A column of prompts may itself hold conversations.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dwakd.errors import UserError

Row = Mapping[str, Any]
CONVERSATIONS = ("messages", "conversations")
INPUTS = ("input", "context")
RESPONSES = {"instruction": ("output", "response", "completion"), "prompt": ("response", "completion", "output")}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and what is to be answered.

    Args:
        index: position of the row in its source, from 0.
        instruction: what the user asks; of a conversation, the user's turn before the answer.
        input: further context, or empty.
        response: the answer to learn, or empty where none is needed.
        references: every acceptable answer, `response` first; empty where there is none.
        history: system text and earlier turns before `instruction`, each {"role": ..., "content": ...}.
    """

    index: int
    instruction: str
    input: str = ""
    response: str = ""
    references: tuple[str, ...] = ()
    history: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; None where there is none."""

    prompt: str
    response: str | None
    input: str | None

    @property
    def used(self) -> tuple[str, ...]:
        """The columns to read, each once."""
        return tuple(dict.fromkeys(name for name in (self.prompt, self.response, self.input) if name is not None))


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
    if response is None and prompt not in CONVERSATIONS:
        known = RESPONSES.get(prompt, RESPONSES["prompt"])
        response = next((name for name in known if name in names), None)
        if response is None and need_response:
            raise UserError(
                f"{source} has no column with the response ({', '.join(known)}); its columns are: {shown}; "
                "name the right one in data.response (eval, shrink: --response)"
            )
    if input is None and prompt == "instruction":
        input = next((name for name in INPUTS if name in names), None)
    return Columns(prompt, response, input)


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
    asked = row.get(columns.prompt)
    if isinstance(asked, list):
        instruction, history, answer = _read_conversation(asked, columns, where, need_response)
    else:
        instruction, history, answer = _text(row, columns.prompt, where), (), None
        if columns.prompt in CONVERSATIONS and columns.response is None:
            raise UserError(f"{where}: {columns.prompt!r} is a string, not a list of turns with role and content")
    if columns.response is not None:
        references = _read_references(row, columns.response, where, need_response)
    else:
        references = () if answer is None else (answer,)
    return Example(
        index=index,
        instruction=instruction,
        input="" if columns.input is None or row.get(columns.input) is None else _text(row, columns.input, where),
        response=references[0] if references else "",
        references=references,
        history=history,
    )


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise UserError(
            f"{where}: the column {column!r} is missing; this row has: {', '.join(map(str, row)) or 'none'}; add it or "
            "remove that row"
        )
    return _checked_text(row[column], f"{where}: {column!r}")


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{what} is {kind}, not a string: correct or remove that row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is no valid Unicode text ({error.reason}): correct or remove that row") from error
    return value


def _read_references(row: Row, column: str, where: str, need_response: bool) -> tuple[str, ...]:
    value = row.get(column)
    if value is None and not need_response:
        return ()
    if not isinstance(value, list):
        return (_text(row, column, where),)
    if value and isinstance(value[-1], dict):  # a completion given as messages
        return (_turns(value, where, column)[-1]["content"],)
    if not value and need_response:
        raise UserError(f"{where}: {column!r} is an empty list: give at least one reference or remove that row")
    return tuple(_checked_text(item, f"{where}: {column!r}[{n}]") for n, item in enumerate(value))


def _turns(conversation: list[Any], where: str, column: str) -> list[dict[str, str]]:
    turns = []
    for n, turn in enumerate(conversation):
        what = f"{where}: {column!r}[{n}]"
        if not isinstance(turn, Mapping):
            raise UserError(f"{what} is {type(turn).__name__}, not an object with role and content")
        role_key, text_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        role, content = (_checked_text(turn.get(key), f"{what} {key}") for key in (role_key, text_key))
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return turns


def _read_conversation(
    conversation: list[Any], columns: Columns, where: str, need_response: bool
) -> tuple[str, tuple[dict[str, str], ...], str | None]:
    """The user's last turn before the answer, what came before it, and the last answer (None: not in here)."""
    turns = _turns(conversation, where, columns.prompt)
    answer: str | None = None
    if columns.response is None and (need_response or (turns and turns[-1]["role"] == "assistant")):
        at = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if at < 0:
            raise UserError(f"{where}: {columns.prompt!r} has no assistant turn to learn: add one or remove that row")
        answer, turns = turns[at]["content"], turns[:at]
    if not turns or turns[-1]["role"] != "user":
        raise UserError(
            f"{where}: the turn before the answer in {columns.prompt!r} must be the user's: correct or remove that row"
        )
    return turns[-1]["content"], tuple(turns[:-1]), answer
