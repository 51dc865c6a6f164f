"""Test that a comparison keeps finished runs, reports failures and searches the best options."""

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwakd.answers.run import training_examples
from dwakd.checksums import CHECKSUMS
from dwakd.cli import main
from dwakd.compare import runner
from dwakd.compare.compare import compare_methods, evaluate_teacher, refuse_other_runs, search
from dwakd.compare.inputs import INPUTS, check_inputs
from dwakd.compare.plan import RATES, Cell, Variant, search_of, variants_of
from dwakd.compare.runner import Runner, lock_of
from dwakd.errors import UserError
from dwakd.evaluation.run import plan_evaluation
from dwakd.folders import alone_in, write_file
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import load_recipe
from tests.answers.builders import make_folder
from tests.compare.builders import ROWS, recipe

SETS = {"test": "rows"}
"""The only test set of these comparisons, and the digest of its rows."""
RESULTS = json.dumps({"signature": {"data": {"sha256": "rows"}}})
OTHER = {"loss.method": "alm", "teacher": {"model": "other", "cache": "own"}}


def test_test_sets_without_references_are_refused(tmp_path):
    """Test sets without references are refused, because they give no scores to compare."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "why?"}\n')
    with pytest.raises(UserError, match=r"questions.jsonl has no references"):
        compare_methods(recipe(evaluation={"test": [str(path)]}), tmp_path / "comparison")


def test_a_folder_of_something_else_is_refused(tmp_path):
    """A folder with other files is refused."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains no comparison"):
        compare_methods(recipe(), tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        compare_methods(recipe(), tmp_path / "notes.txt")
    for name in ("teacher-cache-0123abcd", "answers.parts", "answers-0123abcd.parts"):
        stopped = tmp_path / f"stopped at {name}" / name
        stopped.mkdir(parents=True)
        with pytest.raises(UserError, match="compare needs test sets"):
            compare_methods(recipe(evaluation={"test": []}, compare={"methods": ["sft"]}), stopped.parent)


def test_a_comparison_without_a_finished_run_fails(tmp_path, monkeypatch, capsys):
    """If no run is finished, the exit code is 1. A seed that is given twice is used once."""
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
    """If a teacher cannot be evaluated, the students are still compared, and the results contain the reason."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "why?", "response": "so"}\n')
    monkeypatch.setattr(Runner, "run", lambda self, cells: {})
    monkeypatch.setattr("dwakd.compare.compare.cache_recipe", lambda recipe: [])
    given = recipe(evaluation={"test": [str(rows)]}, teacher={"model": "./missing"}, training={"use_cpu": True})
    compare_methods(given, tmp_path / "out")
    failed = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["teacher"]["failed"]
    assert "./missing does not exist" in failed


def test_the_teacher_is_evaluated_as_it_teaches(tmp_path, monkeypatch):
    """The first row of the table would describe other weights than those that the students learn from."""
    make_folder(tmp_path)
    options = ["teacher.dtype=bfloat16", "evaluation.seeds=1", "evaluation.max_new_tokens=2", "loss.method=alm"]
    options += [f"evaluation.test=[{tmp_path / 'labelled.jsonl'}]", "compare.methods=[alm]", "generate.prompts=[]"]
    monkeypatch.setattr(Runner, "run", lambda self, cells: {})
    monkeypatch.setattr("dwakd.compare.compare.cache_recipe", lambda recipe: [])
    read = load_recipe(tmp_path / "recipe.yaml", options, "compare")
    compare_methods(read, tmp_path / "out")
    (path,) = (tmp_path / "out" / "cells" / "teacher" / "eval").glob("*.json")
    assert json.loads(path.read_text())["signature"]["dtype"] == "bfloat16"
    changed = load_recipe(tmp_path / "recipe.yaml", [*options, "teacher.dtype=float32"], "compare")
    compare_methods(changed, tmp_path / "out")
    assert json.loads(path.read_text())["signature"]["dtype"] == "float32"
    asked = []
    monkeypatch.setattr("dwakd.evaluation.run.load_tokenizer", lambda model, **options: asked.append(options) or 1 / 0)
    hub = read.teachers[0].model_copy(
        update={"revision": "v1.0", "trust_remote_code": True, "chat_template_path": "chat"}
    )
    with pytest.raises(ZeroDivisionError):
        evaluate_teacher(plan_evaluation(read), hub, tmp_path / "other", {"labelled": "rows"}, date="2026-01-31")
    assert asked == [{"revision": "v1.0", "trust_remote_code": True, "chat_template_path": "chat"}]


def test_the_teacher_answers_once_for_all_runs(tmp_path, monkeypatch):
    """The teacher answers before the runs, for all rows that train on its answers; the other rows train on the data."""
    make_folder(tmp_path)
    read = load_recipe(
        tmp_path / "recipe.yaml",
        [
            "generate.output=null",
            f"evaluation.test=[{tmp_path / 'labelled.jsonl'}]",
            "compare.rows={sft: {}, seqkd: {data.responses: teacher}, alm: {data.responses: teacher, loss.method: alm}}",
        ],
        "compare",
    )
    monkeypatch.setattr(Runner, "run", lambda self, cells: runs.extend(map(self.recipe, cells)) or {})
    runs = []
    compare_methods(read, tmp_path / "out")
    assert (tmp_path / "out" / "answers.jsonl").is_file()
    monkeypatch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
    assert [run.data.responses for run in runs] == ["given", "teacher", "teacher"]
    assert len(training_examples(runs[1])) == len(training_examples(runs[2])) > 6
    assert [path.name[:14] for path in (tmp_path / "out").glob("teacher-cache*")] == ["teacher-cache-"]
    compare_methods(read, tmp_path / "out")


def test_rows_with_other_answers_have_their_own_file(tmp_path):
    """Two rows that rewrite one file would train on each other's answers; rows that only differ in the loss share one."""
    rows = {
        "sft": {"loss.method": "sft"},
        "seqkd": {"loss.method": "sft", "data.responses": "teacher"},
        "alm": {"loss.method": "alm", "data.responses": "teacher", "data.max_length": 99},
        "sampled": {"loss.method": "sft", "data.responses": "teacher", "generate.temperature": 1.0},
        "short": {"loss.method": "sft", "data.responses": "teacher", "generate.max_characters": 9},
        "all": {"loss.method": "sft", "data.responses": "teacher", "data.supervise": "all"},
        "hint": {"loss.method": "sft", "data.responses": "teacher", "data.teacher_prompt": "hint"},
        "own": {"loss.method": "sft", "data.responses": "teacher", "generate.output": "own.jsonl"},
    }
    given = recipe(generate={"output": "shared.jsonl"}, compare={"rows": rows})
    variants = variants_of(given, given.compare, ablation=False)
    files = [Runner(given, tmp_path, 1, SETS).recipe(Cell(variant, 1)).generate.output for variant in variants]
    assert files[:3] == ["shared.jsonl"] * 3
    assert {str(Path(file).parent) for file in files[3:7]} == {str(tmp_path)}
    assert len(set(files[2:])) == 6
    assert files[7] == "own.jsonl"


def fake_trainings(monkeypatch):
    """Replace trainings by processes of 0.2 seconds, of which those of dskd fail; return the names of those started."""
    script = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[1]); print('3/4 [00:01'); time.sleep(0.2); "
        "sys.exit('error: no luck') if 'dskd' in folder.name else None; "
        "(folder / 'eval').mkdir(parents=True); (folder / 'dwakd-run.json').write_text('{}'); "
        f"(folder / 'eval' / 'test.json').write_text({RESULTS!r})"
    )
    started = []

    def command(path, folder):
        started.append(folder.name)
        return [sys.executable, "-S", "-c", script, str(folder)]

    monkeypatch.setattr(runner, "train_command", command)
    return started


def test_finished_cells_are_kept_and_a_failed_one_says_why(tmp_path, monkeypatch):
    """Finished runs are not repeated, and a run that fails does not stop the others."""
    started = fake_trainings(monkeypatch)
    cells = [Cell(Variant(name, {"loss.method": name}), seed) for seed in (1, 2) for name in ("sft", "dskd")]
    failures = Runner(recipe(), tmp_path, 2, SETS).run(cells)
    assert failures.keys() == {"dskd-1", "dskd-2"}
    assert failures["dskd-1"].startswith("no luck (")
    started.clear()
    Runner(recipe(), tmp_path, 1, SETS).run(cells)
    assert sorted(started) == ["dskd-1", "dskd-2"]
    scores = tmp_path / "cells" / "sft-2" / "eval" / "test.json"
    other = json.loads(RESULTS)
    other["signature"]["data"]["sha256"] = "before"
    for path in (scores, scores.parent.parent / CHECKSUMS):
        path.write_text(json.dumps(other)) if path == scores else path.unlink()
    with pytest.raises(UserError, match=r"test.json has the scores of other rows than the test set has now: .*sft-2"):
        Runner(recipe(), tmp_path, 1, SETS).run(cells)
    Runner(recipe(), tmp_path, 1, {}).run(cells)
    for content in ("{ ", "{"):
        scores.write_text(content)
        with pytest.raises(UserError, match=r"sft-2 cannot be used: its eval/test.json is damaged.*delete the folder"):
            Runner(recipe(), tmp_path, 1, SETS).run(cells)


def test_the_same_comparison_in_several_processes(tmp_path, monkeypatch):
    """Each cell is trained once, a failure is reported by all, and the cell of a process that died is run by another."""
    started = fake_trainings(monkeypatch)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    cells = [Cell(Variant(name, {"loss.method": name}), seed) for seed in (1, 2) for name in ("sft", "dskd", "alm")]
    path = lock_of(tmp_path, "alm-2").lock_file
    hold = (
        f"import filelock, time; lock = filelock.FileLock({str(path)!r}); lock.acquire(); print('locked', flush=True); "
    )
    hold += "time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(Runner(recipe(), tmp_path, 1, SETS).run, cells) for _ in range(3)]
        while len(started) < 5:
            time.sleep(0.05)
        assert "alm-2" not in started
        assert not any(run.done() for run in running), "they wait for alm-2"
        other.kill()
        failures = [run.result() for run in running]
    other.communicate()
    assert sorted(started) == sorted(cell.name for cell in cells)
    assert failures[0].keys() == {"dskd-1", "dskd-2"}
    assert failures[0] == failures[1] == failures[2]


def test_only_a_lock_is_waited_for(tmp_path, monkeypatch):
    """A run counts as that of another process only if its lock is taken, whatever the reason of its failure says."""
    monkeypatch.setattr(Runner, "_train", lambda *_: ("runs in another process", False))
    monkeypatch.setattr(runner, "POLL_SECONDS", "never")  # waiting would be a TypeError
    cell = Cell(Variant("sft", {"loss.method": "sft"}), 1)
    assert Runner(recipe(), tmp_path, 1, SETS).run([cell]) == {"sft-1": "runs in another process"}


def test_a_stopped_run_is_not_a_failed_one_for_others(tmp_path, monkeypatch):
    """Others continue a run that was stopped, and wait for one that goes on after its comparison was killed."""
    cell = Cell(Variant("sft", {"loss.method": "sft"}), 1)
    for code, others in ((75, {}), (130, {}), (137, {"sft-1": "no luck"}), (3, {"sft-1": "no luck"})):
        script = f"import sys; print('error: no luck'); sys.exit({code})"
        monkeypatch.setattr(runner, "train_command", lambda *_, script=script: [sys.executable, "-c", script])
        other = Runner(recipe(), tmp_path, 1, SETS)
        assert Runner(recipe(), tmp_path, 1, SETS).run([cell])["sft-1"].startswith("no luck (")
        started = fake_trainings(monkeypatch)
        assert {name: reason[:7] for name, reason in other.run([cell]).items()} == others
        assert len(started) == (not others)
        shutil.rmtree(tmp_path / "cells", ignore_errors=True)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    with ThreadPoolExecutor() as pool, alone_in(tmp_path / "cells" / "sft-1"):
        running = pool.submit(Runner(recipe(), tmp_path, 1, SETS).run, [cell])
        time.sleep(0.3)
        assert not running.done()
        for path, content in (("dwakd-run.json", "{}"), ("eval/test.json", RESULTS)):
            write_file(tmp_path / "cells" / "sft-1" / path, content.encode())
    assert running.result() == {}


def test_cells_of_another_recipe_are_refused(tmp_path, monkeypatch):
    """Finished runs of another recipe are refused."""
    cells, cell = Runner(recipe(), tmp_path, 1, SETS), Cell(Variant("sft", {"loss.method": "sft"}), 1)
    folder = cells.cell_folder(cell)
    (folder / "eval").mkdir(parents=True)
    for path in (folder / "dwakd-run.json", folder / "eval" / "test.json"):
        path.write_text(RESULTS)
    (folder / RECIPE_FILE).write_text(cell.recipe(recipe(teacher={"model": "teacher", "cache": "elsewhere"})).dump())
    assert cells.run([cell]) == {}
    saved = (folder / RECIPE_FILE).read_text()
    (folder / RECIPE_FILE).write_text(re.sub(r" +max_length: 512\n", "", saved, count=2))
    assert (folder / RECIPE_FILE).read_text() != saved
    (folder / CHECKSUMS).unlink()
    assert cells.run([cell]) == {}, "a recipe of a version without this option"
    assert Runner(recipe(generate={"prompts": ["more.jsonl"]}), tmp_path, 1, SETS).run([cell]) == {}, (
        "which it does not use"
    )
    more = {"evaluation": {"test": ["test.jsonl", "more.jsonl"]}}
    assert Runner(recipe(**more), tmp_path, 1, SETS).run([cell]) == {}, "the rows of each set are compared"
    finished = iter([False, True])
    monkeypatch.setattr(Runner, "finished", lambda *_: next(finished))
    with pytest.raises(UserError, match="holds another run"):  # finished by another process meanwhile
        Runner(recipe(training={"learning_rate": 2e-3}), tmp_path, 1, SETS).run([cell])
    monkeypatch.undo()
    for changes, message in (
        ({"training": {"learning_rate": 2e-3}}, r"sft-1 holds another run: training.learning_rate is 0.001 there"),
        ({"evaluation": {"test": ["test.jsonl"], "limit": 9}}, "evaluation.limit is None there and 9 here"),
    ):
        with pytest.raises(UserError, match=message):
            Runner(recipe(**changes), tmp_path, 1, SETS).run([cell])


def test_changed_models_and_data_are_noticed(workspace, tmp_path):
    """A table would compare students that started from different weights, or were trained on different rows."""
    for name in ("student", "teacher"):
        shutil.copytree(workspace / name, tmp_path / name)
    shutil.copy(workspace / "data.jsonl", tmp_path / "data.jsonl")
    models = {name: {"model": str(tmp_path / name)} for name in ("student", "teacher")}
    data = {"train": f"{tmp_path / 'data.jsonl'}@[:5]"}
    given = recipe(**models, data=data)
    check_inputs(tmp_path, [given, given])
    check_inputs(tmp_path, [given])
    changes = {"student/model.safetensors": "student.model", "teacher/model.safetensors": "teacher.model"}
    for name, option in (changes | {"data.jsonl": "data.train"}).items():
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before[:-2] + b"?" + before[-1:])
        with pytest.raises(UserError, match=rf"^{option} .* has changed since the first run .*, or delete this folder"):
            check_inputs(tmp_path, [given])
        (tmp_path / name).write_bytes(before)
    check_inputs(tmp_path, [given, recipe(**models, data=data | {"eval": str(workspace / "data.jsonl")})])
    assert len(json.loads((tmp_path / INPUTS).read_text())) == 4


def test_a_search_after_trainings_without_it_is_refused(tmp_path, monkeypatch):
    """The search would take hours before it turns out that its rows were already trained with other options."""
    cells, rows = Runner(recipe(), tmp_path, 1, SETS), [Variant("sft", {"loss.method": "sft"})]
    monkeypatch.setattr(Runner, "finished", lambda self, cell: not cell.search)
    with pytest.raises(UserError, match=r"sft-1 was trained without --lr-sweep: choose another folder"):
        refuse_other_runs(cells, rows, [1, 2])
    log = tmp_path / "logs" / f"{search_of(rows[0], recipe())[0].folder_name}-1.log"
    log.parent.mkdir()
    log.touch()
    refuse_other_runs(cells, rows, [1, 2])  # its search has run, and may have failed


def test_rows_with_the_same_data_and_models_share_a_cache(tmp_path):
    """Rows share a teacher cache if, and only if, their data and models are the same."""
    given = recipe(teacher={"model": "teacher", "cache": "mine"}, compare={"rows": {**ROWS, "other": {**OTHER}}})
    shared = Runner(given, tmp_path, 1, SETS)
    rows = {row.name: shared.recipe(Cell(row, 1)) for row in variants_of(given, given.compare, ablation=False)}
    caches = {name: Path(row.teachers[0].cache).name for name, row in rows.items()}
    assert (caches["dskd"], caches["dwa_kd"], caches["other"]) == ("mine", "mine", "own")
    assert caches["dwa_kd + alm"].startswith("teacher-cache-")
    assert Path(rows["dwa_kd + alm"].teachers[0].cache).parent == tmp_path
    same = Variant("alm", {"loss.method": "alm", "data.train": "more.jsonl", "training.max_steps": 3})
    assert shared.recipe(Cell(same, 2)).teachers == rows["dwa_kd + alm"].teachers
    plain = Runner(recipe(), tmp_path, 1, SETS).recipe(Cell(Variant("dwa_kd", {}), 1))
    assert plain.teachers[0].cache == str(tmp_path / "teacher-cache")
    half = recipe(teacher={"model": "teacher", "cache_dtype": "bfloat16"})
    teacher = Runner(half, tmp_path, 1, SETS).recipe(Cell(Variant("dwa_kd", {"teacher.revision": "x"}), 1)).teachers[0]
    assert (teacher.cache_dtype, Path(teacher.cache).parent, teacher.revision) == ("bfloat16", tmp_path, "x")


def test_a_search_without_evaluations_is_refused(tmp_path):
    """Without an evaluation, all runs of the search would be trained before it turns out that none can be chosen."""
    given = recipe(
        data={"train": "train.jsonl", "eval": "dev.jsonl"}, training={"use_cpu": True, "eval_strategy": "no"}
    )
    with pytest.raises(UserError, match=r"--lr-sweep needs evaluations .*set training\.eval_strategy to epoch"):
        compare_methods(given, tmp_path, lr_sweep=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("metric", "best"), [("eval_bits_per_byte", "lr0.33"), ("eval_rouge_l", "lr3")])
def test_the_search_takes_the_best_on_the_dev_set(tmp_path, monkeypatch, metric, best):
    """The search selects the highest ROUGE-L or the lowest bits per byte on the dev set."""
    script = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True); "
        "value = float(folder.name.split('-lr')[1].split('-')[0]); (folder / 'dwakd-run.json').write_text('{}'); "
        "state = {'log_history': [{'loss': 1.0}, {sys.argv[2]: value}]}; "
        "(folder / 'trainer_state.json').write_text(json.dumps(state))"
    )
    monkeypatch.setattr(
        runner, "train_command", lambda path, folder: [sys.executable, "-c", script, str(folder), metric]
    )
    (chosen,), failures = search(Runner(recipe(), tmp_path, 1, SETS), [Variant("sft", {"loss.method": "sft"})], 1)
    assert not failures
    assert chosen.name == "sft"
    expected = {f"lr{factor:.2g}": factor for factor in RATES}[best]
    assert chosen.rate_factor == expected
