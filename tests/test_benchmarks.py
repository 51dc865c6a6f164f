"""Test that the benchmarks measure the same loss as dwakd computes."""

import dataclasses
import json
import re
import sys
from argparse import Namespace
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import cache, padding, plain, step, tables, trl_peer
from benchmarks.contest import CORE, OURS, Contest, able
from benchmarks.workload import Sizes, build_student

from dwakd.batch import PairedBatch
from dwakd.losses import build_loss
from dwakd.models.rows import response_side

SMALL = ["--batch=2", "--length=24", "--response=8", "--student-vocab=90", "--teacher-vocab=110"]
SMALL += ["--student-hidden=64", "--teacher-hidden=64", "--student-layers=1", "--teacher-layers=1"]
SIZES = Sizes(2, 24, 8, 90, 64, 1, 110, 64, 1)


def test_plain_steps_compute_the_same_losses():
    """The plain implementations of the benchmarks give the losses of dwakd, so that their times can be compared."""
    contest, student = Contest(SIZES), build_student(SIZES)
    rows, teacher = response_side(student, contest.batch.student), contest.teacher.side(*contest.batch.teachers)
    dskd = build_loss("dskd", widths=contest.widths)
    value = plain.response_dskd(student, contest.teacher.model, dskd.projectors, contest.batch)
    torch.testing.assert_close(value, dskd(rows, teacher).loss, rtol=1e-4, atol=1e-5)
    ce = build_loss("sft")(rows).loss
    for function in (plain.sft_response, plain.sft_all_positions):
        torch.testing.assert_close(function(student, contest.batch), ce, rtol=1e-4, atol=1e-5)


def test_batches_by_tokens_have_less_padding():
    """Each way to save padding runs with a teacher and leaves fewer padded tokens than rows in random order."""
    sizes = dataclasses.replace(SIZES, batch=6)
    options = Namespace(clock="cpu", rounds=1, max_tokens=90)
    found = padding.measure("dskd", cache.build_rows(sizes, 12), sizes, options)
    shares = found["share_of_tokens"]
    assert shares["padded"] < shares["by_tokens"] < shares["padding_free"] == 1
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_published_dwa_kd_without_prompt_and_padding(monkeypatch):
    """If all positions are response positions, the published implementation gives the loss of dwakd."""
    sizes = Sizes(2, 8, 8, 90, 64, 1, 110, 64, 1)
    contest, student = Contest(sizes), build_student(sizes)
    for tokens in contest.batch:
        tokens.response_mask[:], tokens.attention_mask[:] = True, 1
    whole = {"num_tokens": (8, 8), "num_rows": (8, 8)}
    sides = [dataclasses.replace(tokens, **whole) for tokens in contest.batch]
    contest.batch = PairedBatch(sides[0], (sides[1],), (0, 1))
    loss = build_loss("dwa_kd", widths=contest.widths)
    rows, teacher = response_side(student, contest.batch.student), contest.teacher.side(*contest.batch.teachers)
    value = plain.published_dwa_kd(student, contest.teacher.model, loss.projectors, contest.batch)
    torch.testing.assert_close(value, loss(rows, teacher).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["uld", "gold"])
def test_trl_computes_the_same_losses(method):
    """For one example, TRL gives the loss and the gradient of dwakd. TRL weights all examples equally."""
    if reason := trl_peer.absent():
        pytest.skip(reason)
    sizes = dataclasses.replace(SIZES, batch=1, length=60, response=40)
    contest, student = Contest(sizes), build_student(sizes)
    rows, teacher = response_side(student, contest.batch.student), contest.teacher.side(*contest.batch.teachers)
    expected = contest.loss(method, student)(rows, teacher).loss
    criterion = trl_peer.criterion(method, sizes)
    value = trl_peer.step_loss(criterion, (student, contest.teacher.model), contest.batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, student.base_model.h[0].mlp.c_fc.weight)[0] for loss in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-7)


def test_a_missing_package_is_reported(monkeypatch, capsys):
    """Without TRL, the benchmarks run and report what is left out."""
    monkeypatch.setitem(sys.modules, "trl.experimental.gold.gold_trainer", None)
    assert able(["dwa_kd", "trl_uld"]) == ["dwa_kd"]
    assert "TRL is left out" in capsys.readouterr().out


def test_step_writes_a_signed_result(tmp_path, monkeypatch, capsys):
    """The results contain sizes, options, versions and the commit."""
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["step", *SMALL, "--rounds=1", "--threads=1", f"--output={path}"])
    step.main()
    result = json.loads(path.read_text())
    assert {"torch", "cpu", "threads", "commit", "options"} <= set(result["signature"])
    (one,) = result["results"]
    assert set(one["median_seconds"]) == set(CORE)
    assert "dwa_kd / products" in capsys.readouterr().out


def test_every_method_is_measured(tmp_path, monkeypatch):
    """The benchmark of methods measures every method and writes a table row for each."""
    sizes = [*SMALL, "--student-vocab=120", "--teacher-vocab=160", "--threads=1"]
    names = [*OURS, "sft_head"]
    monkeypatch.setattr(
        sys, "argv", ["step", *sizes, "--rounds=1", f"--output={tmp_path}/step-methods.json", "--only", *names]
    )
    step.main()
    document = tmp_path / "performance.md"
    document.write_text("<!-- methods -->\n<!-- /methods -->\n")
    monkeypatch.setattr(sys, "argv", ["tables", f"--results={tmp_path}", f"--document={document}"])
    tables.main()
    rows = document.read_text().splitlines()
    assert all(any(row.startswith(f"| `{name}` |") for row in rows) for name in OURS)
    assert sum(row.startswith("| SFT, the teacher's forward") for row in rows) == 1


def test_growth_is_drawn_from_what_was_measured(tmp_path, monkeypatch):
    """Tables and figure of the document are generated from the result files."""
    expected = {"length": {"length": (16, 32), "response": (5, 10)}}
    expected["vocab"] = {"student_vocab": (90, 120), "teacher_vocab": (90, 120)}
    for field, sizes in expected.items():
        values, path = map(str, next(iter(sizes.values()))), tmp_path / f"step-{field}.json"
        varied = ["--vary", field, *values, "--only", "dwa_kd", "sft_response", "--threads=1", f"--output={path}"]
        monkeypatch.setattr(sys, "argv", ["step", *SMALL, *varied])
        step.main()
        results = json.loads(path.read_text())["results"]
        assert {name: tuple(result["sizes"][name] for result in results) for name in sizes} == sizes
    peaks = {"sizes": {"batch": 2}, "peak_bytes": {"dwa_kd": 2.5e9, "published_dskd": None}}
    (tmp_path / "memory-batch.json").write_text(json.dumps({"results": [peaks]}))
    halves = {"uld": 1.0, "trl_uld": 3.0, "uld_loss": 0.5, "trl_uld_loss": 2.0}
    both = {name.replace("uld", method): taken for name, taken in halves.items() for method in ("uld", "gold")}
    for benchmark, measured in (("step", "median_seconds"), ("memory", "peak_bytes")):
        (tmp_path / f"{benchmark}-trl.json").write_text(json.dumps({"results": [{measured: both}]}))
    document = tmp_path / "performance.md"
    document.write_text(
        "# Before\n<!-- growth -->\noutdated\n<!-- /growth -->\nbetween\n<!-- trl -->\n<!-- /trl -->\nafter\n"
    )
    monkeypatch.setattr(sys, "argv", ["tables", f"--results={tmp_path}", f"--document={document}"])
    tables.main()
    path = tmp_path / "performance-growth.svg"
    written, drawn = document.read_text(), path.read_bytes()
    tables.main()
    assert (document.read_text(), path.read_bytes()) == (written, drawn)
    assert written.startswith("# Before\n<!-- growth -->\n\n|  | DWA-KD, s | SFT, response tokens |\n")
    assert "\n<!-- /growth -->\nbetween\n<!-- trl -->\n" in written
    assert written.endswith("<!-- /trl -->\nafter\n")
    assert "outdated" not in written
    assert re.search(r"\| tokens in an example: 32 \| 0\.\d\d \| 0\.\d\d x \|", written)
    assert "| examples in a batch: 2 | 2.50 |" in written
    assert "| `gold` | 4.0 x | 4.0 x | 3.0 x | 3.0 x |" in written
    space = "{http://www.w3.org/2000/svg}"
    groups = {group.get("id"): group for group in ElementTree.parse(path).getroot().iter(f"{space}g")}
    panels = [tables.PANELS[field][1] for field in ("length", "vocab")]
    for line in (f"{name}, {panel}" for name in ("dwa_kd", "sft_response") for panel in panels):
        assert len(re.findall("[ML]", groups[line].find(f"{space}path").get("d"))) == 2, line
    assert sum("dwa_kd, " in str(name) or "sft_response, " in str(name) for name in groups) == 4


def test_help_explains_the_implementations(monkeypatch, capsys):
    """`--help` explains each implementation that is measured."""
    monkeypatch.setattr(sys, "argv", ["step", "--help"])
    with pytest.raises(SystemExit):
        step.main()
    text = capsys.readouterr().out
    assert all(name in text for name in ("published_dskd", "response tokens selected first"))


def test_cache_writes_a_signed_result(tmp_path, monkeypatch):
    """The benchmark of the cache measures a cache on disk."""
    path = tmp_path / "cache-teacher_vocab.json"
    options = ["--rows=4", "--rounds=1", "--threads=1", "--vary", "teacher_vocab", "110", f"--output={path}"]
    monkeypatch.setattr(sys, "argv", ["cache", *SMALL, *options])
    cache.main()
    (one,) = json.loads(path.read_text())["results"]
    assert set(one["median_seconds"]) == set(cache.NAMES)
    assert one["disk"]["bytes_per_response_token"] == 64 * 4
    ratio = one["median_seconds"]["cached"] / one["median_seconds"]["sft"]
    assert f"| {ratio:.2f} |" in tables.cache(tmp_path, tmp_path).splitlines()[2]


def test_the_document_agrees_with_the_results(tmp_path, monkeypatch, capsys):
    """The tables in docs/performance.md agree with the result files."""
    document = tables.RESULTS.parents[1] / "docs" / "performance.md"
    copy = tmp_path / "performance.md"
    copy.write_text(document.read_text())
    monkeypatch.setattr(sys, "argv", ["tables", f"--document={copy}"])
    tables.main()
    assert copy.read_text() == document.read_text()
    assert capsys.readouterr().out.startswith("| step | seconds |")
