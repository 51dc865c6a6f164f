"""Test sets are checked before hours of training or answering depend on them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dwakd.errors import UserError
from dwakd.evaluation.options import RowOptions
from dwakd.evaluation.sets import EvaluationSet, read_test_sets

SCORED = [{"prompt": "2 + 2 =", "response": "4"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def read(paths: list[str]) -> list[EvaluationSet]:
    return read_test_sets(paths, RowOptions())


def test_names_are_unique_and_readable(tmp_path: Path) -> None:
    """Two sets of one name would overwrite each other's answers: half of the results would be the other set's."""
    paths = [write(tmp_path / folder / "p3" / "test.jsonl", SCORED) for folder in ("a", "b")]
    paths += [write(tmp_path / "dolly" / "Test.jsonl", SCORED), write(tmp_path / "c" / "P3" / "test.jsonl", SCORED)]
    names = [item.name for item in read(paths)]
    assert names == ["p3-test", "p3-test-2", "dolly-Test", "P3-test-3"]
    with pytest.raises(UserError, match="named twice"):
        read([paths[0], paths[0]])


def test_splits_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test set without a split `test` is evaluated on `validation`, never on the rows trained on."""
    splits = {name: datasets.Dataset.from_list(SCORED * n) for n, name in enumerate(("train", "validation", "test"), 1)}
    monkeypatch.setattr(
        "dwakd.data.sources.datasets.load_dataset", lambda *_, split: splits[split] if split else splits
    )
    assert len(read(["org/name"])[0].examples) == 3
    del splits["test"]
    assert len(read(["org/name"])[0].examples) == 2
    del splits["validation"]
    with pytest.raises(UserError, match=r"org/name has no split 'test'.* its splits are train; .*org/name@train"):
        read(["org/name"])
    assert len(read(["org/name@train"])[0].examples) == 1


def test_questions_without_answers_are_a_set_of_their_own(tmp_path: Path) -> None:
    """Vicuna's questions have no references; but a set where some rows lack theirs has a mistake in it."""
    questions = [{"instruction": "How?"}, {"instruction": "Why?"}]
    (item,) = read([write(tmp_path / "questions.jsonl", questions)])
    assert not item.scored
    assert len(item.examples) == 2
    mixed = write(tmp_path / "mixed.jsonl", [*SCORED, {"prompt": "3 + 3 =", "response": None}])
    with pytest.raises(UserError, match=r"mixed\.jsonl: 1 of 2 rows .*row 1 "):
        read([mixed])
