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
    """A checked row of a data set: a prompt and its response.

    Args:
        index: position of the row in its source, from 0.
        instruction: the user's request. In a conversation, the content of the turn before the answer.
        input: further context, or empty.
        response: the answer to train on, or empty if none is needed.
        references: all acceptable answers, `response` first; empty if there is none.
        history: the system text and the turns before `instruction`, as dicts with `role`, `content` and the other keys
            of the turn.
        turn: keys of the turn before the answer, without its content; None for a plain user turn.
        options: other arguments of the chat template: `tools`, `documents` and the row's `chat_template_kwargs`.
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
        """All turns of the conversation before the answer."""
        content = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [*self.history, {"role": "user", **(self.turn or {}), "content": content}]


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read.

    Args:
        prompt: column of the prompt, the instruction or the conversation.
        response: column of the response, if there is one.
        input: column of the further context, if there is one.
        extras: other columns for the chat template.
        optional: True if `response` is only used for rows whose conversation in `prompt` ends without an answer.
    """

    prompt: str
    response: str | None
    input: str | None
    extras: tuple[str, ...] = ()
    optional: bool = False

    @property
    def used(self) -> tuple[str, ...]:
        """All columns to read, without repetition."""
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
    """Find the columns of a data set, in the order that the docstring of this module describes.

    Args:
        available: names of all columns.
        source: name of the data set in messages.
        prompt: column of the prompt; None searches for it.
        response: column of the response; None searches for it.
        input: column of the further context; None searches for it.
        need_response: whether a data set without a response is an error.

    Raises:
        UserError: a column that the user named does not exist, or no known column does.
    """
    names = list(available)
    shown = ", ".join(names) or "none"
    for option, name in {"prompt": prompt, "response": response, "input": input}.items():
        if name is not None and name not in names:
            raise UserError(f"{source} has no column {name!r}: set data.{option} to one of its columns ({shown})")
    if prompt is None:
        prompt = next((name for name in (*CONVERSATIONS, *RESPONSES) if name in names), None)
    if prompt is None:
        raise UserError(
            f"{source} has no column with the prompt (messages, conversations, instruction or prompt); its columns "
            f"are: {shown}; set data.prompt (eval, shrink: --prompt) to one of them"
        )
    optional = response is None and prompt in CONVERSATIONS
    if response is None:
        known = RESPONSES.get(prompt, RESPONSES["prompt"])
        response = next((name for name in known if name in names), None)
        if response is None and need_response and not optional:
            raise UserError(
                f"{source} has no column with the response ({', '.join(known)}); its columns are: {shown}; "
                "set data.response (eval, shrink: --response) to one of them"
            )
    if input is None and prompt == "instruction":
        input = next((name for name in INPUTS if name in names), None)
    extras = tuple(name for name in EXTRAS if name in names and name not in (prompt, response, input))
    return Columns(prompt, response, input, extras, optional and response is not None)


def read_example(row: Row, columns: Columns, *, index: int, where: str, need_response: bool) -> Example:
    """Convert a row to a checked example.

    Args:
        row: the values of the row by column name.
        columns: the columns to read.
        index: position of the row in its source.
        where: place of the row, as messages name it: "data.jsonl, line 17".
        need_response: whether a row without a response is an error.

    Raises:
        UserError: a column is missing in this row, or its value has a wrong type.
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
                f"{where}: {columns.response!r} must end with an assistant turn, got a turn of role {answer['role']!r}: "
                "correct or remove that row"
            )
        if earlier and input:
            turns[-1]["content"] += f"\n{input}"
            input = ""
        turns += earlier
    if not turns or turns[-1]["role"] not in _ASKING:
        found = f"role {turns[-1]['role']!r}" if turns else "none"
        raise UserError(
            f"{where}: the turn before the answer in {columns.prompt!r} must be the user's or a tool's, got {found}: "
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
            f"{where}: the column {column!r} is missing (found: {', '.join(map(str, row)) or 'none'}): add it or "
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
    """Read the prompt of a row as turns, with the row's system text as the first turn."""
    asked = row.get(columns.prompt)
    if isinstance(asked, list):
        turns = read_turns(asked, where, columns.prompt)
    else:
        turns = [{"role": "user", "content": _text(row, columns.prompt, where)}]
        if columns.prompt in CONVERSATIONS and (columns.response is None or columns.optional):
            raise UserError(
                f"{where}: {columns.prompt!r} must be a list of turns with role and content, got a string: "
                "correct or remove that row"
            )
    if "system" in columns.extras and (system := row.get("system")):
        turn = {"role": "system", "content": checked_text(system, f"{where}: 'system'")}
        if any(other["role"] == "system" and other != turn for other in turns):
            raise UserError(f"{where}: 'system' and the system turn in {columns.prompt!r} differ: remove one of them")
        turns = [turn, *(other for other in turns if other != turn)]
    return turns


def _split(
    turns: list[dict[str, Any]], column: str, where: str, need_response: bool
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Split a conversation into the turns before the answer and the answer, which may be missing if none is needed."""
    if not need_response and not (turns and turns[-1]["role"] == "assistant"):
        return turns, None
    at = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if at < 0:
        raise UserError(f"{where}: {column!r} has no assistant turn to train on: add one or remove that row")
    return turns[:at], turns[at]
