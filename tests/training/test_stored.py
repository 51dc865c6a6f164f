"""Test the file of encoded rows: it has the rows that are encoded in memory, and is made again only if something changed."""

import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dwakd.data.encoded import EncodedPairs, StoredRows
from dwakd.data.encoding import TextEncoder
from dwakd.recipe.training import DistillConfig
from dwakd.training import inputs
from dwakd.training.inputs import encode_source
from tests.builders import bpe_byte_fallback, byte_bpe

ENCODERS = TextEncoder(byte_bpe(), "plain"), TextEncoder(bpe_byte_fallback(), "plain"), TextEncoder(byte_bpe(), "plain")
ROWS = [{"prompt": f"Ask {n} é", "response": f"Answer {n} " * (n % 12 + 1), "who": f"{n % 2 + 1}"} for n in range(40)]
ROWS[3]["response"] = " "
ROWS[7]["prompt"] = "long " * 90


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("dwakd.data.encoded._BATCH", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return tmp_path


def encoded(folder: Path, source: Any = None, encoders: Any = ENCODERS, **options: Any) -> EncodedPairs:
    given = {"method": "min_ed", "teacher_key": "who", "max_length": 64, "max_prompt_length": 32, **options}
    args = DistillConfig(output_dir=str(folder), use_cpu=True, invalid_rows="skip", template="plain", **given)
    found = encode_source(source or folder / "rows.jsonl", encoders, args, "train", "the rows")[1]
    assert found is not None
    return found


def assert_same(found: EncodedPairs, expected: EncodedPairs) -> None:
    assert [found[n] for n in range(len(found))] == [expected[n] for n in range(len(expected))]
    for name in ("text", "place", "truncated", "chosen", "example_id"):
        assert [getattr(row, name) for row in found.rows] == [getattr(row, name) for row in expected.rows]
    assert (found.report, found.source, found.num_truncated) == (
        expected.report,
        expected.source,
        expected.num_truncated,
    )
    for side in range(3):
        assert list(found.lengths(side)) == list(expected.lengths(side))


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache" / "dwakd").glob("*.arrow")}


def test_stored_rows_are_those_in_memory_and_encoded_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start reads the same rows, numbers and warnings from the file, and never encodes."""
    with caplog.at_level(logging.WARNING, "dwakd"):
        expected = encoded(folder, ROWS)
        warnings = [record.getMessage() for record in caplog.records]
        caplog.clear()
        first = encoded(folder)
        assert [record.getMessage() for record in caplog.records] == warnings
        caplog.clear()
        monkeypatch.setattr(inputs, "encode_pairs", None)
        second = encoded(folder)
        assert [record.getMessage() for record in caplog.records] == warnings
    assert len(warnings) == 2
    assert isinstance(second.rows, StoredRows)
    assert expected.report == {"response empty": [3], "prompt too long": [7]}
    for found in (first, second, pickle.loads(pickle.dumps(second))):
        assert_same(found, expected)
    for index in range(2):
        own, other = second.of_teacher(index), expected.of_teacher(index)
        assert [row.example_id for row in own.rows] == [row.example_id for row in other.rows]
        assert [row.teachers[0].features() for row in own.rows[:3]] == [
            row.teachers[0].features() for row in other.rows[:3]
        ]
        assert list(own.lengths(1)) == list(other.lengths(1))
    assert [row.example_id for row in second.rows[-3:]] == [37, 38, 39]


def test_the_file_depends_on_everything_that_changes_the_rows(folder: Path) -> None:
    """Each change of data, options or tokenizers encodes again; a start without a change uses a known file."""
    changed: list[dict[str, Any]] = [
        {},
        {"max_length": 65},
        {"max_prompt_length": 31},
        {"method": "alm"},
        {"teacher_key": None},
        {"teacher_names": ["1", "2"]},
        {"lmbda": 1.0, "method": "gold"},
        {"source": f"{folder / 'rows.jsonl'}@[2:]"},
        {"source": datasets.Dataset.from_list(ROWS)},
        {"encoders": (ENCODERS[0], ENCODERS[2], ENCODERS[2])},
        {"encoders": (TextEncoder(byte_bpe(), "{instruction}:"), *ENCODERS[1:])},
        {"encoders": (TextEncoder(byte_bpe(), "plain", special_tokens_in_prompts="text"), *ENCODERS[1:])},
        {"encoders": (TextEncoder(byte_bpe(vocab_size=380), "plain"), *ENCODERS[1:])},
    ]
    for count, options in enumerate(changed, 1):
        encoded(folder, **options)
        assert len(files(folder)) == count, options
    encoded(folder)
    assert len(files(folder)) == len(changed)
    with (folder / "rows.jsonl").open("a") as file:
        file.write(f"{json.dumps(ROWS[0])}\n")
    assert len(encoded(folder)) == len(ROWS) - 1
    assert len(files(folder)) == len(changed) + 1


@pytest.mark.parametrize("damage", ["flip", "cut", "json"])
def test_a_damaged_file_is_made_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Rows are never read from a file that was changed, which would train on other tokens without an error."""
    expected = encoded(folder)
    rows = [expected[n] for n in range(len(expected))]
    path = folder / "cache" / "dwakd" / files(folder).pop()
    del expected
    if damage == "json":
        path.with_suffix(".json").write_text("{")
    else:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2].tobytes() if damage == "cut" else data.tobytes())
    found = encoded(folder)
    assert "are damaged: they are encoded again" in caplog.text
    assert [found[n] for n in range(len(found))] == rows


def test_of_several_processes_one_encodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start together encode the rows once: the others wait for the first one."""
    calls, original = [], inputs.encode_pairs
    monkeypatch.setattr(inputs, "encode_pairs", lambda *rows, **options: calls.append(1) or original(*rows, **options))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: len(encoded(folder)), range(3)))
    assert (found, len(calls)) == ([len(ROWS) - 2] * 3, 1)
    assert not [path for path in (folder / "cache" / "dwakd").iterdir() if path.suffix == ".tmp"]


def test_workers_open_the_file_again(folder):
    """A worker process that is spawned gets the rows by pickle, which would copy the whole data set."""
    pairs = encoded(folder)
    for rows in (pairs, pairs.of_teacher(1)):
        data = pickle.dumps(rows)
        assert len(data) < 1000
        assert [pickle.loads(data)[n] for n in range(len(rows))] == [rows[n] for n in range(len(rows))]


def test_rows_that_other_code_has_encoded_are_encoded_again(folder, monkeypatch):
    """The version of the package stays the same between two commits."""
    encoded(folder)
    before = files(folder)
    monkeypatch.setattr("dwakd.training.stored.code_digest", lambda: "other code")
    encoded(folder)
    assert len(files(folder) - before) == 1
