"""Comparisons: the right cells, kept when finished, named when failed, and differences that are paired."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dwakd.cli import main
from dwakd.compare import run as compare_run
from dwakd.compare.compare import _search, _teacher, compare_methods
from dwakd.compare.plan import RATES, Cell, Variant, search_of, variants_of
from dwakd.compare.run import Runner
from dwakd.compare.table import CellScores, paired_interval, read_cell, summarise_comparison
from dwakd.config import RECIPE_FILE, recipe_from_dict
from dwakd.errors import UserError
from dwakd.losses import METHODS

CONTENT = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": "train.jsonl"},
    "loss": {"method": "dwa_kd", "temperature": 3.0},
    "training": {"learning_rate": 1e-3},
    "evaluation": {"test": ["test.jsonl"]},
    "compare": {"methods": ["sft", "dskd", "dwa_kd"], "seeds": [1, 2], "options": {"dskd": {"kd_rate": 0.3}}},
}


def recipe(**changes):
    return recipe_from_dict({**CONTENT, **changes})


def scores(*values):
    return CellScores({"test": np.array(values, dtype=float)}, {"test": 1.0}, {"test": 2.0}, 0.5, 1000)


def test_each_method_gets_its_own_options():
    """The temperature of the recipe's method must not reach another, nor be lost."""
    found = {variant.name: variant for variant in variants_of(recipe(), recipe().compare, ablation=False)}
    assert found["dwa_kd"].options == {"temperature": 3.0}
    assert found["dskd"].options == {"kd_rate": 0.3}
    assert found["sft"].options == {}
    one = Cell(found["dskd"], 7).recipe(recipe())
    assert one.loss == {"method": "dskd", "kd_rate": 0.3}
    assert (one.training["seed"], one.training["data_seed"], one.compare) == (7, 7, None)


def test_options_of_the_comparison_stand_above_the_loss_section():
    """One option given anew must not reset the others."""
    changed = recipe(compare={"methods": ["dwa_kd"], "options": {"dwa_kd": {"dtw_weight": 0.1}}})
    (variant,) = variants_of(changed, changed.compare, ablation=False)
    assert variant.options == {"temperature": 3.0, "dtw_weight": 0.1}


def test_failures_of_any_name_are_told_in_the_results(monkeypatch, tmp_path):
    """Names of ablation rows are no folder names, and a teacher has no seed."""
    reasons = {Cell(Variant("dskd + dtw", "dwa_kd", {}), 2).name: "no luck"}
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    (tmp_path / "logs").mkdir()
    assert _teacher(recipe(), recipe().teachers[0], tmp_path, "teacher 2", reasons) == []
    rows = summarise_comparison({"dskd + dtw": [], "teacher 2": [], "sft": []}, reasons)["variants"]
    assert rows["dskd + dtw"] == {"failed": "no luck"}
    assert rows["teacher 2"]["failed"].startswith("exit code 1")
    assert rows["sft"] == {"failed": "not run"}


def test_test_sets_without_references_are_refused(tmp_path):
    """A table of means over nothing."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "why?"}\n')
    with pytest.raises(UserError, match=r"questions.jsonl has no references"):
        compare_methods(recipe(evaluation={"test": [str(path)]}), tmp_path / "comparison")


def test_a_folder_of_something_else_is_refused(tmp_path):
    """Cells and a cache of gigabytes among somebody's models."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no comparison"):
        compare_methods(recipe(), tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        compare_methods(recipe(), tmp_path / "notes.txt")


def test_a_comparison_without_a_finished_run_fails(tmp_path, monkeypatch, capsys):
    """A script that goes on after a table of failures; and a seed named twice is one run, not two."""
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


def test_a_run_that_reads_attention_has_no_cache():
    """A comparison caches its teachers once for all runs; no cache holds attention."""
    cached = recipe(teacher={"model": "teacher", "cache": "folder"})
    caches = [
        Cell(Variant("sra", "sra", {"span_weights": weights}), 1).recipe(cached).teachers[0].cache
        for weights in ("attention", "uniform")
    ]
    assert caches == [None, "folder"]
    half = recipe(teacher={"model": "teacher", "cache_dtype": "bfloat16"})
    assert Cell(Variant("sra", "sra", {}), 1).recipe(half).teachers[0].cache_dtype is None, "which a run would refuse"


def test_ablation_rows_switch_what_their_names_say():
    """A row of the ablation that trains something else makes the table a lie."""
    rows = {variant.name: variant for variant in variants_of(recipe(), recipe().compare, ablation=True)}
    assert len(rows) == 6
    assert rows["dwa_kd without gate"].options == {"temperature": 3.0, "gate": False}
    assert rows["dskd + dtw"].options["band"] is False
    assert "dtw_hidden" not in rows["dskd + banded dtw"].options
    assert len({Cell(variant, 1).name for variant in rows.values()}) == 6


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.options_type.needs_teacher])
def test_every_method_has_a_share_of_distillation_to_search(method):
    """A method whose weight goes by another name would be searched over learning rates alone."""
    options = [variant.options for variant in search_of(Variant(method, method, {}))]
    assert len(options) == 6
    (name,) = {name for option in options for name in option}
    assert len({option[name] for option in options}) == 2


def test_the_search_is_the_same_for_every_method():
    """A method that is searched less loses for want of tuning."""
    sft, dskd, dwa_kd = (search_of(variant) for variant in variants_of(recipe(), recipe().compare, ablation=False))
    assert (len(sft), len(dskd), len(dwa_kd)) == (3, 6, 6)
    assert {variant.options["kd_rate"] for variant in dskd} == {0.3, 0.15}
    rates = {Cell(variant, 1, search=True).recipe(recipe()).training["learning_rate"] for variant in sft}
    assert rates == {0.000333, 0.001, 0.003}
    assert Cell(sft[0], 1, search=True).recipe(recipe()).evaluation.test == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["dwakd"]}, r"unknown method 'dwakd' in compare\.methods; valid ones"),
        ({"methods": ["sft"], "options": {"dskd": {}}}, r"compare\.options names dskd"),
        ({"methods": ["dskd"], "options": {"dskd": {"tau": 1}}}, r"unknown option compare\.options\.dskd\.tau"),
        (
            {"methods": ["dskd"], "options": {"dskd": {"kd_rate": "a"}}},
            r"compare\.options\.dskd\.kd_rate must be a number",
        ),
        ({"methods": ["dskd"], "options": {"dskd": 3}}, "must be options with values, got 3"),
    ],
)
def test_mistakes_show_before_anything_runs(section, message):
    """Else the last method of a night's comparison fails in the morning."""
    changed = recipe(compare=section)
    with pytest.raises(UserError, match=message):
        variants_of(changed, changed.compare, ablation=False)


def test_the_ablation_reads_all_options():
    """Options of a method that the ablation lacks are for the same recipe's comparison, and no place for mistakes."""
    section = {"methods": ["alm", "dwa_kd"], "options": {"alm": {}, "dskd": {"kd_rate": 0.3}}}
    changed = recipe(compare=section)
    rows = {variant.name: variant for variant in variants_of(changed, changed.compare, ablation=True)}
    assert rows["dskd"].options == {"kd_rate": 0.3}
    changed = recipe(compare={**section, "options": {"alm": {"tau": 1}}})
    with pytest.raises(UserError, match="unknown option"):
        variants_of(changed, changed.compare, ablation=True)


def test_finished_cells_are_kept_and_a_failed_one_says_why(tmp_path, monkeypatch):
    """A comparison is stopped and started again, and one method's failure must not cost the others."""
    script = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); print('3/4 [00:01'); "
        "sys.exit('error: no luck') if 'dskd' in folder.name else None; "
        "(folder / 'eval').mkdir(parents=True); (folder / 'dwakd-run.json').write_text('{}'); "
        "(folder / 'eval' / 'test.json').write_text('{}')"
    )
    started = []

    def command(path, folder):
        started.append(folder.name)
        return [sys.executable, "-c", script, str(folder)]

    monkeypatch.setattr(compare_run, "train_command", command)
    cells = [Cell(Variant(name, name, {}), seed) for seed in (1, 2) for name in ("sft", "dskd")]
    failures = Runner(recipe(), tmp_path, 2).run(cells)
    assert failures.keys() == {"dskd-1", "dskd-2"}
    assert failures["dskd-1"].startswith("no luck (")
    started.clear()
    Runner(recipe(), tmp_path, 1).run(cells)
    assert sorted(started) == ["dskd-1", "dskd-2"]


def test_cells_of_another_recipe_are_refused(tmp_path):
    """A table that mixes runs of two recipes compares nothing."""
    runner, cell = Runner(recipe(), tmp_path, 1), Cell(Variant("sft", "sft", {}), 1)
    folder = runner.cell_folder(cell)
    (folder / "eval").mkdir(parents=True)
    for path in (folder / "dwakd-run.json", folder / "eval" / "test.json"):
        path.write_text("{}")
    (folder / RECIPE_FILE).write_text(cell.recipe(recipe(teacher={"model": "teacher", "cache": "elsewhere"})).dump())
    assert runner.run([cell]) == {}
    for changes, message in (
        ({"training": {"learning_rate": 2e-3}}, r"sft-1 holds another run: training.learning_rate is 0.001 there"),
        ({"evaluation": {"test": ["test.jsonl"], "limit": 9}}, "evaluation.limit is None there and 9 here"),
    ):
        with pytest.raises(UserError, match=message):
            Runner(recipe(**changes), tmp_path, 1).run([cell])


@pytest.mark.parametrize(("metric", "best"), [("eval_bits_per_byte", "lr0.33"), ("eval_rouge_l", "lr3")])
def test_the_search_takes_the_best_on_the_dev_set(tmp_path, monkeypatch, metric, best):
    """Low is good for bits per byte and high for ROUGE-L: the wrong way round, every method gets its worst rate."""
    script = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True); "
        "value = float(folder.name.split('-lr')[1].split('-')[0]); (folder / 'dwakd-run.json').write_text('{}'); "
        "state = {'log_history': [{'loss': 1.0}, {sys.argv[2]: value}]}; "
        "(folder / 'trainer_state.json').write_text(json.dumps(state))"
    )
    monkeypatch.setattr(
        compare_run, "train_command", lambda path, folder: [sys.executable, "-c", script, str(folder), metric]
    )
    (chosen,), failures = _search(Runner(recipe(), tmp_path, 1), [Variant("sft", "sft", {})], 1)
    assert not failures
    assert chosen.name == "sft"
    expected = {f"lr{factor:.2g}": factor for factor in RATES}[best]
    assert chosen.rate_factor == expected


def test_differences_are_paired():
    """Rows differ far more than methods do: without pairing every interval would hold zero."""
    easy_and_hard = [5.0, 90.0, 40.0, 70.0, 10.0, 55.0]
    ours, other = scores(*(value + 2 for value in easy_and_hard)), scores(*easy_and_hard)
    difference, low, high = paired_interval([ours], [other])
    assert (difference, low, high) == pytest.approx((2.0, 2.0, 2.0))
    summary = summarise_comparison({"sft": [other], "dwa_kd": [ours, ours], "dskd": []}, {"dskd-1": "no luck"})
    assert summary["best"] == "dwa_kd"
    assert summary["variants"]["dwa_kd"]["versus_sft"][0] == pytest.approx(2.0)
    assert summary["variants"]["dskd"] == {"failed": "no luck"}


def test_scores_are_the_means_over_generation_seeds(tmp_path):
    """In percent as they are written: a second factor of a hundred made scores of 138."""
    (tmp_path / "eval").mkdir()
    numbers = {"greedy_rouge_l": {"mean": 12.0}, "bits_per_byte": {"value": 1.5}}
    (tmp_path / "eval" / "test.json").write_text(json.dumps(numbers))
    answers = [
        {"row": row, "seed": seed, "rouge_l": 10.0 * row + (seed or 0)} for row in (1, 0) for seed in (2, 4, None)
    ]
    (tmp_path / "eval" / "test.answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    cell = read_cell(tmp_path)
    assert cell.rouge_l["test"].tolist() == [3.0, 13.0]
    assert (cell.greedy["test"], cell.bits_per_byte["test"]) == (12.0, 1.5)
