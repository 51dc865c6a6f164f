"""A comparison refuses what cannot be compared, and reports what failed."""

import json
import sys

import pytest

from dwakd.cli import main
from dwakd.compare.compare import compare_methods
from dwakd.compare.run import Runner
from dwakd.errors import UserError
from tests.compare.builders import recipe


def test_test_sets_without_references_are_refused(tmp_path):
    """There would be no scores to compare."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "why?"}\n')
    with pytest.raises(UserError, match=r"questions.jsonl has no references"):
        compare_methods(recipe(evaluation={"test": [str(path)]}), tmp_path / "comparison")


def test_a_folder_of_something_else_is_refused(tmp_path):
    """Runs and a large cache must not be written among other files of the user."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains no comparison"):
        compare_methods(recipe(), tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        compare_methods(recipe(), tmp_path / "notes.txt")


def test_a_comparison_without_a_finished_run_fails(tmp_path, monkeypatch, capsys):
    """The exit code must stop a script; and a seed that is named twice is one run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "why?", "response": "so"}\n')
    path, started = tmp_path / "recipe.yaml", []
    path.write_text(recipe(evaluation={"test": [str(rows)]}, compare=None).dump())
    monkeypatch.setattr(Runner, "run", lambda self, cells: started.extend(cells) or {})
    words = ["compare", str(path), "--methods", "sft", "--seeds", "1,1", "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["dwakd", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1, capsys.readouterr().err
    assert [cell.name for cell in started] == ["sft-1"]


def test_a_teacher_that_cannot_be_evaluated_is_reported(tmp_path, monkeypatch):
    """The table of the students must not be lost, and the reason must be in the results."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "why?", "response": "so"}\n')
    monkeypatch.setattr(Runner, "run", lambda self, cells: {})
    monkeypatch.setattr("dwakd.compare.compare.cache_recipe", lambda recipe: [])
    given = recipe(evaluation={"test": [str(rows)]}, teacher={"model": "./missing"}, training={"use_cpu": True})
    compare_methods(given, tmp_path / "out")
    failed = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["teacher"]["failed"]
    assert "./missing does not exist" in failed
