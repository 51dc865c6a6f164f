"""Test that scores are read from the folders of the runs and that their differences are paired."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from dwakd.compare.plan import Cell, Variant
from dwakd.compare.scores import CellScores, read_cell
from dwakd.compare.table import comparison_tables, paired_intervals, summarise_comparison
from dwakd.evaluation.evaluate import TEXT_METRIC


def scores(*values):
    rows = np.stack([np.array(values, dtype=float), np.ones(len(values))])
    bits = {"test": np.array([[2.0, 6.0], [1.0, 3.0]])}
    return CellScores({"rouge_l": {"test": rows}, "bits_per_byte": bits}, {"test": 3.0}, {}, {}, 0.5, 1000)


def shown(tables, width=120) -> str:
    """Return tables as text."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables)
    return console.export_text()


def test_differences_are_paired():
    """Intervals of differences are paired by row, because rows differ much more than methods do."""
    easy_and_hard = [5.0, 90.0, 40.0, 70.0, 10.0, 55.0]
    ours, other = scores(*(value + 2 for value in easy_and_hard)), scores(*easy_and_hard)
    found = paired_intervals({"ours": [ours], "other": [other]}, "rouge_l")
    assert found["ours", "other"] == pytest.approx((2.0, 2.0, 2.0))
    assert found["other", "ours"] == pytest.approx((-2.0, -2.0, -2.0))
    summary = summarise_comparison({"sft": [other], "dwa_kd": [ours, ours], "dskd": []}, {"dskd-1": "no luck"})
    versus = summary["variants"]["dwa_kd"]["versus"]
    assert versus["sft"]["rouge_l"][0] == pytest.approx(2.0)
    assert versus["sft"]["bits_per_byte"] == pytest.approx((0.0, 0.0, 0.0))
    assert versus.keys() == {"sft"}
    assert summary["variants"]["dskd"] == {"failed": "no luck"}


def test_reasons_are_shown_as_they_are():
    """Rich would read [openai] as a style and hide it, and end with a traceback at [/tmp]."""
    reason = "[/tmp] is full; pip install 'dwakd[openai]'"
    summary = summarise_comparison({"sft": [scores(1.0, 2.0)]}, {"alm-1": reason})
    assert f"run alm-1 failed: {reason}" in shown(comparison_tables(summary))


def test_intervals_contain_the_noise_of_rows_and_of_seeds():
    """The interval of a mean difference is about 1.96 standard errors wide on each side, and seeds widen it."""
    noise = np.random.default_rng(1).normal(0, 10, 400)
    ours, other = scores(*(50 + noise)), scores(*([49.0] * 400))
    difference, low, high = paired_intervals({"a": [ours], "b": [other]}, "rouge_l")["a", "b"]
    assert difference == pytest.approx(1 + noise.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * noise.std() / 20, rel=0.15)
    seeds = [scores(*(value + noise)) for value in (40.0, 60.0)]
    _, low, high = paired_intervals({"a": seeds, "b": [other]}, "rouge_l")["a", "b"]
    assert high - low > 18


def test_rows_that_a_model_could_not_score_are_left_out_for_all():
    """Otherwise the rows of two models would be paired by chance, and models be compared on different rows."""

    def cell(**sets):
        return CellScores({"bits_per_byte": {name: np.array(rows, dtype=float) for name, rows in sets.items()}})

    generator = np.random.default_rng(0)
    bits, num_bytes = generator.uniform(1, 50, 40), np.full(40, 10)
    gap = np.arange(40) != 7
    whole = cell(long=[bits, num_bytes], short=[bits * 2, num_bytes])
    cut = cell(long=[(bits + 10) * gap, num_bytes * gap], short=[bits * 2 + 10, num_bytes])
    other = cell(long=[bits[:30], num_bytes[:30]])
    found = paired_intervals({"whole": [whole, whole], "cut": [cut]}, "bits_per_byte")
    assert found["cut", "whole"] == pytest.approx((1.0, 1.0, 1.0))
    found = paired_intervals({"whole": [whole], "cut": [cut], "other": [other]}, "bits_per_byte")
    assert found["cut", "other"] == pytest.approx((1.0, 1.0, 1.0))
    assert found["whole", "other"] == pytest.approx((0.0, 0.0, 0.0))
    assert paired_intervals({"whole": [whole], "text": [cell(text=[[1.0], [1.0]])]}, "bits_per_byte") == {}


def test_the_calibration_error_is_computed_anew_in_each_resample(tmp_path):
    """A mean of the errors of single rows is no calibration error: the gaps of rows cancel within a bin."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test.answers.jsonl").write_text("")
    rng = np.random.default_rng(0)
    gaps = np.stack([rng.normal(0.5, 1, 300), rng.normal(-0.2, 1, 300), rng.integers(4, 9, 300)]).T
    bits = {"rows": [[row, 1.0, 1] for row in range(1, 301)], "ece": 7.0, "row_gaps": gaps.tolist()}
    numbers = {"bits_per_byte": bits, "signature": {"metric": "rougeL F1 x 100"}}
    (tmp_path / "eval" / "test.json").write_text(json.dumps(numbers))
    cell = read_cell(tmp_path)
    exact = CellScores({"ece": {"test": np.stack([np.zeros(301), np.ones(301)])}})
    difference, low, high = paired_intervals({"a": [cell], "b": [exact]}, "ece")["a", "b"]
    assert difference == pytest.approx(100 * np.abs(gaps[:, :2].sum(0)).sum() / gaps[:, 2].sum())
    draws = gaps[rng.integers(300, size=(2000, 300))].sum(1)
    expected = np.percentile(100 * np.abs(draws[:, :2]).sum(1) / draws[:, 2], [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), rel=0.05)
    summary = summarise_comparison({"a": [cell], "b": [cell]}, {})
    assert summary["variants"]["a"]["versus"]["b"]["ece"] == pytest.approx((0.0, 0.0, 0.0))


def test_scores_are_the_means_over_generation_seeds(tmp_path):
    """Scores are means over the generation seeds, in percent."""
    (tmp_path / "eval").mkdir()
    numbers = {"greedy_rouge_l": {"mean": 12.0}, "bits_per_byte": {"rows": [[0, 1.0, 2], [3, 8.0, 4]], "ece": 4.0}}
    numbers["signature"] = {"metric": "rougeL F1 x 100"}
    text = {"signature": {"metric": TEXT_METRIC}, "bits_per_byte": {"value": 0.9, "ece": 1.0}}
    (tmp_path / "eval" / "text.json").write_text(json.dumps(text))
    numbers["other_temperatures"] = {"0.7": {"rouge_l": {"mean": 20.0}}}
    (tmp_path / "eval" / "test.json").write_text(json.dumps(numbers))
    answers = [
        {"answer": "\u2028", "row": row, "seed": seed, "rouge_l": 10.0 * row + (seed or 7), "exact_match": 100.0 * row}
        for row in (1, 0)
        for seed in (2, 4, None)
    ]
    answers += [{"row": row, "seed": 2, "temperature": 0.7, "rouge_l": 20.0, "exact_match": 0.0} for row in (0, 1)]
    (tmp_path / "eval" / "test.answers.jsonl").write_text(
        "\n".join(json.dumps(answer, ensure_ascii=False) for answer in answers), encoding="utf-8"
    )
    cell = read_cell(tmp_path)
    assert cell.scores["rouge_l"]["test"][0].tolist() == [3.0, 13.0]
    assert cell.scores["greedy_rouge_l"]["test"][0].tolist() == [7.0, 17.0]
    assert cell.scores["greedy_exact_match"]["test"][0].tolist() == [0.0, 100.0]
    assert (cell.mean("greedy_rouge_l"), cell.mean("bits_per_byte")) == (12.0, 1.5)
    assert cell.scores["bits_per_byte"]["test"].tolist() == [[1.0, 0.0, 0.0, 8.0], [2.0, 0.0, 0.0, 4.0]]
    assert (cell.ece["test"], cell.other_temperatures) == (4.0, {"0.7": [20.0]})
    row = summarise_comparison({"sft": [cell, cell]}, {})["variants"]["sft"]
    assert (row["bits_per_byte"], row["text_bits_per_byte"]) == (1.5, 0.9)
    assert (row["ece"], row["other_temperatures"]) == (4.0, {"0.7": 20.0})


def test_reasons_of_failures_belong_to_their_rows():
    """The reason of a failure is shown in the row of its variant or teacher."""
    reasons = {Cell(Variant("dskd + dtw", {}), 2).name: "no luck", "teacher 2": "no memory"}
    rows = summarise_comparison({"dskd + dtw": [], "teacher 2": [], "sft": []}, reasons)["variants"]
    assert rows == {
        "dskd + dtw": {"failed": "no luck"},
        "teacher 2": {"failed": "no memory"},
        "sft": {"failed": "not run"},
    }


def test_seconds_until_the_final_value_of_sft():
    """The time is that of the first evaluation whose mean over the seeds reaches the final mean of SFT."""
    one = scores(1.0, 2.0)
    sft = [replace(one, dev=((10, 3.0), (20, 2.0), (30, value))) for value in (1.0, 1.4)]
    early = [replace(one, seconds_per_step=2.0, dev=((10, 1.2), (20, value))) for value in (1.0, 1.2)]
    late = [replace(one, dev=((10, 1.3), (20, 1.21)))]
    rows = {"teacher": [replace(one, seconds_per_step=None)], "base": sft, "early": early, "late": late}
    summary = summarise_comparison(rows, {}, "base")
    found = {name: row.get("seconds_until_sft", "-") for name, row in summary["variants"].items()}
    assert found == {"teacher": "-", "base": 15.0, "early": 20.0, "late": None}
    assert "base" in summary["variants"]["late"]["versus"]
    text = shown(comparison_tables(summary))
    assert re.search(r"late .* never *\n", text)
    assert re.search(r"early .* 20\.0 *\n", text)
    untimed = summarise_comparison({"sft": [one], "early": early}, {})
    assert "seconds until" not in shown(comparison_tables(untimed))


def test_all_columns_fit_into_80(tmp_path):
    """The widest tables, with several temperatures, texts and the time until SFT's value, are shown whole."""
    one = replace(scores(12.0, 99.0), dev=((10, 3.0),), text_bits_per_byte={"text": 1.5})
    one = replace(one, other_temperatures={"0.5": [70.0], "0.7": [60.0]}, seconds_per_step=1234.5)
    summary = summarise_comparison({"teacher": [replace(one, dev=())], "sft": [one], "dwa_kd + alm": [one, one]}, {})
    text = shown(comparison_tables(summary), width=80)
    assert "…" not in text
    assert "cut" not in text
    cut = shown(comparison_tables(summarise_comparison({"sft": [one, replace(one, num_truncated=3)]}, {})))
    assert (
        "sft: bits per byte does not include the end of 3 responses, which were cut at evaluation.max_length"
        in " ".join(cut.split())
    )
    assert all(value in text for value in ("1234.500", "70.00", "60.00", "12345.0"))


def test_evaluations_are_read_from_the_log(tmp_path):
    """Evaluations on the dev set are read from the log of the training."""
    history = [
        {"step": 5, "loss": 2.0},
        {"step": 5, "eval_bits_per_byte": 1.5},
        {"step": 9, "eval_bits_per_byte": 1.25},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_cell(tmp_path).dev == ((5, 1.5), (9, 1.25))
