"""Read and check the turns of a conversation. Keys other than role and content are kept for the chat template."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from dwakd.data.files import Unusable, parse_json
from dwakd.errors import UserError

Turn = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_FLAGS = frozenset({"weight", "loss", "train", "training"})
"""Keys of an assistant turn that select whether the model is trained on it (OpenAI, ms-swift, axolotl)."""
_METADATA = frozenset({
    "id", "uuid", "index", "hash", "message_id", "parent_id", "turn_id", "turn_identifier", "tool_call_id",
    "request_id", "session_id", "openai_id", "timestamp", "time", "date", "created", "created_at", "updated_at",
    "model", "model_name", "source", "url", "language", "lang", "country", "state", "header", "hashed_ip",
    "temperature", "top_p", "tokens", "num_tokens", "token_count", "token_counter", "score", "rating", "toxic",
    "redacted",
})  # fmt: skip
"""Keys of a turn that the model does not have to see. Chat templates omit them on purpose, even the id of a tool call."""
THOUGHTS = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Keys of an assistant turn that contain the model's reasoning before its answer."""
_ANSWER_PARTS = THOUGHTS | {"tool_calls"}
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""Arguments of `apply_chat_template` that a row must not set."""


def usable(value: Any, column: str, depth: int = 100) -> Any:
    """Return a value of a column without the nulls inside, which `datasets` inserts for keys that a row lacks."""
    if isinstance(value, Unusable) or depth < 0:
        reason = value.reason if isinstance(value, Unusable) else "a value that is nested too deeply"
        raise UserError(f"{column!r} contains {reason}")
    if isinstance(value, Mapping):
        return {key: usable(item, column, depth - 1) for key, item in value.items() if item is not None}
    return [usable(item, column, depth - 1) for item in value] if isinstance(value, list) else value


def sent_turn(turn: Turn) -> Turn:
    """Return a turn as a server reads it, without the keys that are not for the model."""
    return {key: value for key, value in turn.items() if key == "tool_call_id" or key not in _FLAGS | _METADATA}


def read_turns(conversation: list[Any], column: str) -> list[Turn]:
    """Read the turns of a conversation. Each has `role`, `content` and those of its other keys that are not empty."""
    turns = []
    for n, turn in enumerate(conversation):
        what = f"{column!r}[{n}]"
        if not isinstance(turn, Mapping):
            raise UserError(f"{what} must be an object with role and content, got {type(turn).__name__}")
        role_key, text_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        role, content = checked_text(turn.get(role_key), f"{what} {role_key}"), turn.get(text_key)
        kept = {key: value for key, value in _filled(turn).items() if key not in (role_key, text_key)}
        read = {"role": _ROLES.get(role, role), "content": "", **kept}
        if isinstance(content, list):
            content = "".join(_part_text(part, f"{what} {text_key}") for part in content)
        if content is not None or not content_keys(read):  # a turn may have tool calls and no text
            read["content"] = checked_text(content, f"{what} {text_key}")
        turns.append(read)
    return turns


def _part_text(part: Any, what: str) -> str:
    """Return the text of a part of a content that is a list."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        found = "a part of type text without a text" if kind == "text" else f"a part of type {kind!r}"
        raise UserError(f"{what} has {found}, but only parts {{'type': 'text', 'text': ...}} are supported")
    return str(part["text"])


def read_options(columns: Mapping[str, Any], *, is_conversation: bool) -> dict[str, Any]:
    """Read the arguments of a row's chat template: `tools`, `documents` and the entries of `chat_template_kwargs`.

    If the prompt of the row is not a conversation, `tools` and `documents` without objects are ignored.
    """
    options: dict[str, Any] = {}
    for name in ("chat_template_kwargs", "documents", "tools"):
        value = columns.get(name)
        value = usable(_parsed(value), name) if isinstance(value, str) else value
        is_kwargs = name == "chat_template_kwargs"
        if is_kwargs and isinstance(value, Mapping):
            options = _filled(value)
            if taken := _RESERVED.intersection(options):
                raise UserError(f"{name!r} must not set {min(taken)!r} (tools and documents have their own columns)")
        elif not is_kwargs and is_object_list(value):
            options[name] = value
        elif value and (is_kwargs or is_conversation):
            kind = "an object" if is_kwargs else "a list of objects"
            raise UserError(f"{name!r} must be {kind} or its JSON, got {value!r:.40}")
    return options


def check_answer(turn: Turn, what: str, need_response: bool) -> None:
    """Refuse an answer with other parts than text, reasoning and tool calls, or with a weight other than 1."""
    if need_response and not is_trained(turn):
        flag = next(flag for flag in sorted(_FLAGS & set(turn)) if turn[flag] != 1)
        raise UserError(
            f"{what} has {flag} {turn[flag]!r}, but every answer is trained with weight 1 (data.supervise: all leaves out "
            "answers of weight 0)"
        )
    if keys := [key for key in content_keys(turn) if key not in _ANSWER_PARTS]:
        raise UserError(f"{what} has {keys[0]!r}, but only content, tool_calls and reasoning_content are trained")


def is_trained(turn: Turn) -> bool:
    """Return whether no key of an assistant turn says that the model is not trained on it."""
    return all(turn[flag] == 1 for flag in _FLAGS & set(turn))


def content_keys(turn: Turn) -> list[str]:
    """Return the keys of a turn, other than role and content, that the model has to see."""
    ignored = {"role", "content", *_METADATA, *_FLAGS}
    if turn["role"] not in ("user", "assistant", "system"):
        ignored.add("name")  # the call already contains a tool's name
    return [key for key in turn if key not in ignored]


def texts_to_show(
    turns: list[Turn], options: Mapping[str, Any], *, thoughts: bool = False
) -> list[tuple[int, str, str]]:
    """Collect every text and number that a prompt must contain, with the index of its turn (-1 for options) and its key.

    Types, identifiers and metadata are not among them, nor are switches of a template. Text between <think> and </think>
    in an assistant's content is included only with `thoughts`, because templates remove it from earlier turns.
    """
    found = []
    for n, turn in enumerate(turns):
        texts = [turn["content"]]
        if turn["role"] == "assistant" and "</think>" in turn["content"]:
            opened = "" if "<think>" in turn["content"].split("</think>")[0] else "<think>"
            pattern = "</?think>" if thoughts else r"<think>.*?</think>"
            texts = re.split(pattern, opened + turn["content"], flags=re.DOTALL)
        found += [(n, "content", text) for text in texts]
        found += [(n, key, text) for key in content_keys(turn) for text in _texts(turn[key])]
    found += [(-1, key, text) for key, value in structured(options).items() for text in _texts(value)]
    return [(n, key, text.strip()) for n, key, text in found if text.strip()]


def structured(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with content for the model; the others are switches such as enable_thinking."""
    return {key: value for key, value in options.items() if isinstance(value, (list, Mapping))}


def parse_arguments(value: Any, parsed: list[dict[str, Any]]) -> Any:
    """Copy (part of) turns with every JSON string under a key `arguments` parsed; append these objects to `parsed`."""
    if isinstance(value, list):
        return [parse_arguments(item, parsed) for item in value]
    if not isinstance(value, Mapping):
        return value
    read = {key: parse_arguments(item, parsed) for key, item in value.items()}
    if isinstance(value.get("arguments"), str):
        found = _parsed(value["arguments"])
        if isinstance(found, dict):
            with suppress(UserError):  # a repeated key
                usable(found, "arguments")
                read["arguments"] = found
                parsed.append(found)
    return read


def write_arguments(value: Any) -> Any:
    """Copy (part of) turns with every object under a key `arguments` written as JSON."""
    if isinstance(value, list):
        return [write_arguments(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: json.dumps(item, ensure_ascii=False)
        if key == "arguments" and isinstance(item, Mapping)
        else write_arguments(item)
        for key, item in value.items()
    }


def is_object_list(value: Any) -> TypeGuard[list[Any]]:
    """Return whether a value is a list of objects, such as the turns of a conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def checked_text(value: Any, what: str) -> str:
    """Return a value that must be a string of valid Unicode; the message of an error begins with `what`."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{what} must be a string, got {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode text ({error.reason})") from error
    return value


def _parsed(text: str) -> Any:
    """Parse a JSON text; return the text itself if it is not valid JSON."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text


def _texts(value: Any, arguments: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if arguments or isinstance(item, Mapping) or key not in (_METADATA | {"type"}):
                yield from _texts(item, arguments or key == "arguments")
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, arguments)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are not empty."""
    return {key: value for key, value in values.items() if value not in ("", [], {})}
