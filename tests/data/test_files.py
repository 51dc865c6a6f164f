"""Test that values which a parser cannot handle are ignored in unused columns and refused in used ones."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.data.test_chat import say

PROMPTS, RESPONSES = pyarrow.array(["2 + 2?", "3 + 3?"]), pyarrow.array(["4", "6"])
TEXTS = {"prompt": PROMPTS, "response": RESPONSES}
MAPS = pyarrow.array([[("lang", "en")], []], type=pyarrow.map_(pyarrow.string(), pyarrow.string()))
UUIDS = pyarrow.ExtensionArray.from_storage(pyarrow.uuid(), pyarrow.array([bytes(16)] * 2, type=pyarrow.binary(16)))
LONG = "7" * 5000


def of_tomorrow(kind: str) -> bytes:
    """Return metadata with a feature type that this version of `datasets` does not know."""
    return json.dumps({"info": {"features": {name: {"_type": kind} for name in TEXTS}}}).encode()


def read(path: Path) -> list[tuple[str, str]]:
    return [(example.instruction, example.response) for example in load_examples(path)]


def refusal(path: Path) -> str | None:
    """Return the message that refuses a file, or None if it can be read."""
    try:
        load_examples(path)
    except UserError as error:
        return str(error)
    return None


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_examples(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "table",
    [
        pyarrow.table({**TEXTS, "headers": MAPS}),
        pyarrow.table({**TEXTS, "meta": pyarrow.StructArray.from_arrays([MAPS], ["headers"])}),
        pyarrow.table({**TEXTS, "id": UUIDS}),
        pyarrow.table({**TEXTS, "time": pyarrow.array([2**62] * 2, type=pyarrow.timestamp("us"))}),
        pyarrow.table(TEXTS).replace_schema_metadata({b"huggingface": of_tomorrow("OfTomorrow")}),
        pyarrow.table(TEXTS).replace_schema_metadata({b"huggingface": b"\xff{", b"pandas": b"{"}),
    ],
    ids=["map", "map in a struct", "UUID", "year 148108", "later features", "damaged metadata"],
)
def test_unused_columns_and_metadata_of_unknown_types(tmp_path: Path, table: pyarrow.Table) -> None:
    """Files of Spark or of a later `datasets` are read if only unused columns have unknown types."""
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [("2 + 2?", "4"), ("3 + 3?", "6")]


@pytest.mark.parametrize(
    "responses",
    [
        RESPONSES.cast(pyarrow.large_string()),
        RESPONSES.cast(pyarrow.string_view()),
        RESPONSES.dictionary_encode(),
        pyarrow.array([["4", "four"], ["6"]], type=pyarrow.large_list(pyarrow.string())),
        pyarrow.array([["4", "four"], ["6"]], type=pyarrow.list_view(pyarrow.string())),
    ],
    ids=lambda array: str(array.type),
)
def test_text_of_any_arrow_type(tmp_path: Path, responses: pyarrow.Array) -> None:
    """String views (Polars) and dictionaries (pandas) are read as text."""
    parquet.write_table(pyarrow.table({"prompt": PROMPTS, "response": responses}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [("2 + 2?", "4"), ("3 + 3?", "6")]


def test_turns_hold_what_was_written(tmp_path: Path) -> None:
    """JSON that `datasets` stores as text inside turns is read as objects, as templates expect."""
    turns = [
        say("user", "a", extra={"b": [1]}),
        say("assistant", "b", extra=2),
        say("user", "c"),
        say("assistant", "d"),
    ]
    table = datasets.Dataset.from_dict({"messages": [turns]}, on_mixed_types="use_json")
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for source in (table, str(tmp_path / "rows.parquet")):
        assert load_examples(source)[0].turns == turns[:-1]


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (RESPONSES.cast(pyarrow.binary()), "row 0 (counting from 0): 'response' must be a string, got bytes"),
        (pyarrow.nulls(2), "row 0 (counting from 0): 'response' must be a string, got null"),
        (MAPS, "row 0 (counting from 0): 'response'[0] must be a string, got tuple"),
        (UUIDS, "'response' must be a string, got UUID"),
        (pyarrow.array([2**62] * 2, type=pyarrow.timestamp("us")), "OverflowError"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_columns_that_hold_no_text(tmp_path: Path, responses: pyarrow.Array, message: str) -> None:
    """A column without text is refused with the file and the row, or with the reason of pyarrow."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": PROMPTS, "response": responses}), path)
    error = error_of(path)
    assert str(path) in error
    assert message in error


def test_damaged_parquet_files(tmp_path: Path) -> None:
    """A damaged Parquet file raises a UserError that names the file, whatever exception pyarrow raises."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(TEXTS), path)
    good = path.read_bytes()
    damaged = [good[:length] for length in range(0, len(good), 97)]
    damaged += [good[:at] + bytes([good[at] ^ 0x5A]) + good[at + 1 :] for at in range(0, len(good), 7)]
    refusals = []
    for content in [*damaged, b"PAR1PAR1", b"PARE" + bytes(100) + b"PARE"]:
        path.write_bytes(content)
        refusals.append(refusal(path))
    found = [text for text in refusals if text is not None]
    assert len(found) > len(damaged) // 3
    assert all(str(path) in text for text in found)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_python_cannot_convert(tmp_path: Path, suffix: str) -> None:
    """Integers with thousands of digits, as in mathematical data sets, are accepted in unused columns."""
    path = tmp_path / f"rows.{suffix}"

    def write(prompt: str, answer: str) -> Path:
        row = f'{{"prompt": {prompt}, "response": "7", "answer": {answer}}}'
        path.write_text(f"[{row}]" if suffix == "json" else row)
        return path

    assert read(write('"7?"', f"[-{LONG}]")) == [("7?", "7")]
    assert "'prompt' contains a number of 5,000 digits" in error_of(write(LONG, "1"))
    for depth in (900, 100_000):
        nested = "[" * depth + "]" * depth
        assert str(path) in str(refusal(write(nested, "1")))
        assert str(path) in (refusal(write('"7?"', nested)) or str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response,response\na,b,c\n", "line 1: more than one column has the name 'response'"),
        ("a.csv", "\ufeffprompt,response,prompt\na,b,c\n", "line 1: more than one column has the name 'prompt'"),
        ("a.csv", "prompt,response, response \na,b,c\n", "line 1: more than one column has the name 'response'"),
        (
            "a.jsonl",
            '\n{"prompt": "a", "response": "b", "response": "c"}',
            "line 2: expected an object with named columns, got an object with more than one key 'response'",
        ),
        ("a.json", '[{"prompt": "a", "prompt": "b", "response": "c"}]', "more than one key 'prompt'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "line 1: 'messages' contains an object with more than one key 'content'",
        ),
    ],
)
def test_two_columns_of_one_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A file is refused if a used name is repeated, because the parser would keep only the last value."""
    (tmp_path / name).write_text(content)
    error = error_of(tmp_path / name)
    assert error.startswith(str(tmp_path / name))
    assert message in error


def test_two_parquet_columns_of_one_name(tmp_path: Path) -> None:
    """Repeated names are also refused inside the turns of a conversation."""
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.Table.from_arrays([PROMPTS, RESPONSES, PROMPTS], ["prompt", "response", "response"]), path
    )
    assert "more than one column has the name 'response'" in error_of(path)
    turns = pyarrow.StructArray.from_arrays([PROMPTS, PROMPTS, RESPONSES], ["role", "content", "content"])
    parquet.write_table(pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 2], turns)}), path)
    error = error_of(path)
    assert str(path) in error
    assert "duplicate field names" in error


def test_repetitions_that_lose_nothing(tmp_path: Path) -> None:
    """Repeated names are accepted in unused columns: nameless columns of spreadsheets, and keys of metadata."""
    (tmp_path / "a.csv").write_text(",prompt,response,,\n0,a,b,,\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b", "meta": {"n": 1, "n": 2}}')
    assert read(tmp_path / "a.csv") == read(tmp_path / "a.jsonl") == [("a", "b")]


def test_files_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for a path that cannot be opened contains the path and the reason of the operating system."""
    (tmp_path / "a.parquet").mkdir()
    assert f"{tmp_path / 'a.parquet'}: cannot be read" in error_of(tmp_path / "a.parquet")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for source in (str(tmp_path / "loop.jsonl"), "x" * 5000, "a\0b.jsonl", "~no-such-user/a.jsonl"):
        assert f"{source[:100]}" in error_of(source)
    path = tmp_path / "a.jsonl"
    path.write_text("")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(path) == f"{path}: cannot be read (PermissionError: Permission denied)"
