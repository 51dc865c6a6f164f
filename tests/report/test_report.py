"""Test what `dwakd report` reads from the folders of runs, and what its page contains."""

import json
import os
import re
import shutil

import pytest

from dwakd.errors import UserError
from dwakd.report import page
from dwakd.report.collect import collect
from dwakd.report.report import write_report
from tests.command_line import one_sentence, run
from tests.report.builders import HOSTILE, RIGHT_TO_LEFT, comparison, copy_run, similarity_file

PARTS = ["Summary", "Results", "Training", "Time and memory", "Answers", "Options", "Environment"]


def parts_of(html):
    return re.findall(r"<section id=.*?><h2>(.*?)</h2>", html)


def test_a_run_of_dwakd_train_is_read_completely(trained):
    """All parts that a report shows are in the folder that dwakd train writes today, under the names that are read."""
    found = collect([trained])
    [one] = found.runs
    assert (one.name, found.notes) == ("run", [])
    assert one.options["loss.method"] == "dwa_kd"
    assert {"loss", "ce", "kd_student", "grad_norm", "term_grad_norm/ce"} <= one.history[0].keys()
    [evaluation] = one.evaluations.values()
    assert evaluation.other_temperatures["0.7"].rouge_l.n == 3
    assert len(evaluation.answers) == 3 * (2 * 2 + 1)
    assert one.record["hardware"].keys() == {"platform", "CPU", "GPU"}


def test_the_page_of_a_run(trained, tmp_path, monkeypatch, capsys):
    """The command names the file, and the page has every part, with the versions and a curve of each term."""
    code, out, err = run(monkeypatch, capsys, "report", trained, "-o", tmp_path / "new" / "report.html")
    assert (code, "report.html" in out) == (0, True), err
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert parts_of(html) == PARTS
    titles = [
        json.loads(spec).get("title") for spec in re.findall(r'<script type="application/json">(.*?)</script>', html)
    ]
    assert {"workspace0-data: ROUGE-L", "loss", "ce", "grad_norm", "term_grad_norm/ce", "learning_rate"} <= {*titles}
    assert "versions.torch" in html
    assert "hardware.CPU" in html


def test_a_comparison(trained, tmp_path):
    """Rows have the order and the names of comparison.json, runs of a search are left out, and failures are named."""
    folder = comparison(trained, tmp_path / "out", {"dwa_kd + x": "dwa_kd", "sft": "sft"}, seeds=(1, 2))
    copy_run(trained, folder / "cells" / "sft-lr3-1")
    copy_run(trained, folder / "cells" / "teacher")
    found = collect([folder, folder / "cells" / "sft-1", folder])
    names = ["sft, seed 1", "sft, seed 2", "dwa_kd + x, seed 1", "dwa_kd + x, seed 2", "teacher"]
    assert [one.name for one in found.runs] == names
    assert len(found.notes) == 2, "the failure of the comparison, once for each time that it is given"
    write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Difference to sft, with the 95 % interval" in html
    assert re.search(r">dwa_kd \+ x</td>\s*<td class=\"number\" data-sort=\"0.0\">\+0.00 \[\+0.00, \+0.00\]", html)


def test_scores_on_other_rows_are_not_compared(trained, tmp_path):
    """Rows of two versions of a test set were paired by their number, and an answer stood below another question."""
    folders = [copy_run(trained, tmp_path / name, method=method) for name, method in (("a", "sft"), ("b", "dskd"))]
    [path] = (folders[1] / "eval").glob("*.json")
    numbers = json.loads(path.read_text())
    numbers["signature"] |= {"max_new_tokens": 5, "tokenizer": "x"}
    path.write_text(json.dumps(numbers))
    assert collect(folders).notes == [
        f"the scores on {path.stem} were computed with different values of max_new_tokens, so they do not show "
        "differences of the models only"
    ]
    numbers["signature"]["data"]["sha256"] = "0123456789"
    path.write_text(json.dumps(numbers))
    found = collect(folders)
    assert found.notes == [
        f"the test set {path.stem} has other rows in some runs, so these are shown as different sets"
    ]
    assert [name for run in found.runs for name in run.evaluations][1] == f"{path.stem} 01234567"
    write_report(folders, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Difference to sft" not in html
    assert html.count('<div class="answers">') == 6, "three rows of each version"


def test_options_that_differ(trained, tmp_path):
    """The table of differences contains the options that differ and no other."""
    folders = [trained, copy_run(trained, tmp_path / "other", method="dskd")]
    write_report(folders, tmp_path / "report.html")
    options = (tmp_path / "report.html").read_text(encoding="utf-8").split("<h2>Options</h2>")[1].split("</section>")[0]
    assert re.findall(r'<button type="button">(.*?)</button>', options) == ["run", "loss.method"]


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"log_history": 3, "versions": 4}', "\x00", "[" * 100_000])
@pytest.mark.parametrize(
    "name", ["dwakd-recipe.yaml", "dwakd-run.json", "trainer_state.json", "eval/*.json", "eval/*.jsonl"]
)
def test_a_damaged_file_is_left_out(trained, tmp_path, monkeypatch, capsys, name, content):
    """A damaged file costs its own part of the page, and one sentence names it; there is no traceback."""
    folder = copy_run(trained, tmp_path / "run")
    [path] = folder.glob(name)
    path.write_text(content)
    shutil.copy(path, folder / "other.json")
    code, out, err = run(monkeypatch, capsys, "report", folder, "-o", tmp_path / "report.html")
    assert (code, err) == (0, "")
    if (name, content[:2]) != ("dwakd-run.json", '{"') and name != "trainer_state.json":
        assert f"{path} is left out because it is damaged" in out
    assert "Summary" in parts_of((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trainer_state.json", {"log_history": [3, {"step": "a", "loss": float("nan")}, {"step": 1, "loss": float("inf")}]}),
        ("trainer_state.json", {"log_history": [{"step": 1, "loss": [], "tokens_per_second": "fast"}]}),
        ("dwakd-run.json", {"peak_memory_bytes": "much", "num_steps": [], "seconds_per_step": {}}),
        ("eval/*.json", {"bits_per_byte": {"value": 1, "bits": 1, "bytes": 0, "num_examples": 1, "num_truncated": 0,
                                           "ece": 1, "rows": [[0, 1, 0]]}}),
        ("eval/*.json", {"num_examples": float("inf")}),
        ("eval/*.json", {"other_temperatures": []}),
        ("eval/*.json", {"signature": {"temperature": []}}),
    ],
)  # fmt: skip
def test_values_of_another_type_are_left_out(trained, tmp_path, name, change):
    """Numbers that are not finite, and values of another type, do not break the page."""
    folder = copy_run(trained, tmp_path / "run")
    [path] = folder.glob(name)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("Results" in parts_of(html)) == (
        name != "eval/*.json" or change.keys() & {"bits_per_byte", "signature"} != set()
    )


def test_missing_parts(trained, tmp_path):
    """A run that was stopped has a page without scores and with the curves of its last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoint-3")
    for name in ("dwakd-run.json", "trainer_state.json", "dwakd-recipe.yaml"):
        (folder / name).unlink()
    shutil.rmtree(folder / "eval")
    with pytest.raises(UserError, match="contains no run: give a folder"):
        collect([folder])
    shutil.copy(trained / "dwakd-recipe.yaml", folder)
    [one] = collect([folder]).runs
    assert one.history[-1]["step"] == 2
    write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert parts_of(html) == ["Summary", "Training", "Time and memory", "Options"]


def test_mistakes_are_one_sentence(trained, tmp_path, monkeypatch, capsys):
    """A wrong folder, an output that is a folder, and a missing package are named with the fix."""
    for words, expected in (
        ([tmp_path / "none"], "is not a folder"),
        ([tmp_path], "contains no run"),
        ([trained, "-o", tmp_path], "is a folder: name an HTML file with --output"),
    ):
        code, _, err = run(monkeypatch, capsys, "report", *words)
        assert (code, expected in one_sentence(err)) == (2, True)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    code, _, err = run(monkeypatch, capsys, "report", trained, "-o", tmp_path / "report.html")
    assert (code, 'pip install "dwakd[report]"' in one_sentence(err)) == (2, True)


def test_a_file_of_dwakd_similarity(trained, tmp_path):
    """A file of dwakd similarity in the folder of a run gives box plots; other JSON files are no such files."""
    folder = copy_run(trained, tmp_path / "run")
    (folder / "other.json").write_text('{"students": {"a": 1}}')
    similarity_file(folder / "similarity.json", ["a", HOSTILE])
    found = collect([folder])
    assert [*found.similarity] == [str(folder / "similarity.json")]
    assert len(found.notes) == 1
    write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Similarity" in parts_of(html)
    assert html.count("(M_cos)") == html.count("(M_prod)") == 2


def test_ten_methods_fit_into_five_megabytes(trained, tmp_path):
    """Long answers and logs are cut, so that the page can be sent by mail and opened on a phone."""
    folder = comparison(
        trained, tmp_path / "out", {f"method {k}": "dwa_kd" for k in range(10)}, text=f" {HOSTILE} מילה" * 25
    )
    for path in folder.glob("cells/*/trainer_state.json"):
        state = json.loads(path.read_text())
        state["log_history"] = [{**state["log_history"][0], "step": step} for step in range(2_000)]
        path.write_text(json.dumps(state))
    for path in folder.glob("cells/*/eval/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({**line, "row": 3 * k + line["row"]}) + "\n" for k in range(30) for line in lines)
        )
    write_report([folder], tmp_path / "report.html")
    assert 1e6 < (tmp_path / "report.html").stat().st_size < 5e6
    assert re.search(r"\d+ of 90 rows are not shown", (tmp_path / "report.html").read_text(encoding="utf-8"))
    write_report([folder], tmp_path / "short.html", num_rows=2)
    assert "88 of 90 rows are not shown" in (tmp_path / "short.html").read_text(encoding="utf-8")


def test_hostile_text_is_shown_as_text(trained, tmp_path):
    """Scripts in answers, names and reasons of failures are shown as text."""
    folder = comparison(
        trained, tmp_path / HOSTILE.replace("/", "∕"), {"a": "sft", "b": HOSTILE}, text=HOSTILE + RIGHT_TO_LEFT
    )
    write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<img src="https' not in html
    assert html.count("<script>") == 2
    assert RIGHT_TO_LEFT in html


def test_the_token_of_the_hub_is_not_shown(trained, tmp_path):
    """A recipe may contain the token for uploads, and a report is sent to others."""
    folder = copy_run(trained, tmp_path / "run")
    recipe = folder / "dwakd-recipe.yaml"
    recipe.write_text(recipe.read_text().replace("training:\n", "training:\n  hub_token: hf_secret\n"))
    assert "hf_secret" in recipe.read_text()
    write_report([folder, trained], tmp_path / "report.html")
    assert "hf_secret" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_alignments(trained, tmp_path):
    """Tokens of training rows are shown aligned; if the models are on another machine, a note says so."""
    write_report([trained], tmp_path / "report.html", num_aligned=1)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert parts_of(html) == [*PARTS[:-2], "Alignments", *PARTS[-2:]]
    assert '<span class="pair ' in html
    sft = copy_run(trained, tmp_path / "sft", method="sft")
    write_report([sft, trained], tmp_path / "both.html", num_aligned=1)
    both = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert f"<h3>{trained.name}</h3>" in both, "sft computes no alignment"
    folder = copy_run(trained, tmp_path / "run")
    recipe = folder / "dwakd-recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/student", "/moved"))
    [note] = write_report([folder], tmp_path / "report.html", num_aligned=1)
    assert "the alignments of run are left out" in note


def test_scores_of_earlier_weights_are_left_out(trained, tmp_path):
    """A run that was continued with fewer test sets still has the scores of its earlier weights on the others."""
    folder = copy_run(trained, tmp_path / "run")
    (path,) = (folder / "eval").glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["signature"]["model"]["sha256"] = "earlier"
    earlier = folder / "eval" / "earlier.json"
    earlier.write_text(json.dumps(content), encoding="utf-8")
    os.utime(earlier, (1, 1))
    other = {**content, "signature": {**content["signature"], "dtype": "bfloat16"}}
    (folder / "eval" / "rounded.json").write_text(json.dumps(other), encoding="utf-8")
    found = collect([folder])
    assert sorted(found.runs[0].evaluations) == sorted(["rounded", path.stem]), "in bfloat16, the digest is another one"
    assert "on earlier are left out: they are those of earlier weights" in found.notes[0]
