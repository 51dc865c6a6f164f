"""Test the files and tables that `dwakd eval` writes."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import Evaluation, SampledScores, evaluate_model
from dwakd.evaluation.options import EvalOptions
from dwakd.evaluation.report import evaluation_table, write_evaluation
from tests.builders import byte_bpe, tiny_model

EXAMPLES = [
    Example(4, "Name three colours.", response="Red, green and blue.", references=("Red, green and blue.", "e")),
    Example(5, "Привет!", response="a 1"),
]


def evaluated(examples: list[Example], seeds: int) -> Evaluation:
    """Return the evaluation of a random model with short answers."""
    options = EvalOptions(max_new_tokens=12, seeds=seeds)
    return evaluate_model(tiny_model("llama", 400), TextEncoder(byte_bpe(), "plain"), examples, options, progress=False)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluated(EXAMPLES, seeds=2)


def test_files_carry_signature_and_answers(evaluation: Evaluation, tmp_path: Path) -> None:
    """The files contain the answers, and the options and versions that produced the scores."""
    json_path, answers_path = tmp_path / "new" / "set.json", tmp_path / "new" / "set.answers.jsonl"
    write_evaluation(evaluation, json_path)
    written = json.loads(json_path.read_text(encoding="utf-8"))
    assert written["rouge_l"]["n"] == 2
    assert written["num_examples"] == 2
    signature = written["signature"]
    assert signature["seeds"] == [10, 20]
    assert (signature["temperature"], signature["top_p"], signature["max_new_tokens"]) == (1.0, 1.0, 12)
    assert (signature["stemmer"], signature["references"], signature["template"]) == (True, "best", "plain")
    assert set(signature["versions"]) == {"dwakd", "rouge-score", "torch", "transformers"}
    lines = [json.loads(line) for line in answers_path.read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [
        (4, 10),
        (5, 10),
        (4, 20),
        (5, 20),
        (4, None),
        (5, None),
    ]
    assert lines[1]["prompt"] == "Привет!\n"
    assert lines[0]["references"] == ["Red, green and blue.", "e"]
    assert lines[0]["rouge_l"] == evaluation.answers[0].rouge_l
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["set.answers.jsonl", "set.json"]


def shown(rows: dict[str, Evaluation], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluation_table(rows))
    return capture.get()


def column(rows: dict[str, Evaluation], heading: str) -> list[str]:
    """Return the cells of the column with this heading."""
    (found,) = (one for one in evaluation_table(rows).columns if " ".join(str(one.header).split()) == heading)
    return [str(cell) for cell in found.cells]


def test_table_shows_spread_mean_and_signature(evaluation: Evaluation) -> None:
    """The table shows the spread over seeds, the mean over test sets, and how the numbers were computed."""
    assert evaluation.rouge_l is not None
    assert evaluation.bits_per_byte is not None
    other = replace(evaluation, rouge_l=replace(evaluation.rouge_l, mean=evaluation.rouge_l.mean + 10))
    text = shown({"dolly": evaluation, "p3": other}, 500)
    assert f"{evaluation.rouge_l.mean:.2f} ± {evaluation.rouge_l.std:.2f}" in text
    assert " ".join(text.split()).count("seeds 10/20") == 1
    assert "mean of 2 sets" in text
    for heading, mean in (
        ("ROUGE-L sampled", f"{evaluation.rouge_l.mean + 5:.2f}"),
        ("bits per byte", f"{evaluation.bits_per_byte.value:.3f}"),
        ("ECE", f"{evaluation.bits_per_byte.ece:.2f}"),
    ):
        assert column({"dolly": evaluation, "p3": other}, heading)[2:] == [mean], heading


def test_each_temperature_has_a_row(evaluation: Evaluation) -> None:
    """The scores of temperature 0.7 must neither replace those of temperature 1 nor enter their mean."""
    assert evaluation.rouge_l is not None
    assert evaluation.exact_match is not None
    colder = replace(evaluation.rouge_l, mean=evaluation.rouge_l.mean + 4)
    warm = replace(evaluation, other_temperatures={"0.7": SampledScores(colder, evaluation.exact_match)})
    hotter = replace(warm, other_temperatures={"0.7": SampledScores(replace(colder, mean=0.0), evaluation.exact_match)})
    rows = {"dolly": warm, "p3": hotter}
    labels = [label.strip() for label in column(rows, "test set")]
    assert labels == ["dolly", "temperature 0.7", "p3", "temperature 0.7", "mean of 2 sets", "temperature 0.7"]
    sampled = [float(cell.split()[0]) for cell in column(rows, "ROUGE-L sampled")]
    assert sampled[1::2] == pytest.approx([colder.mean, 0.0, colder.mean / 2], abs=0.005)
    assert sampled[::2] == pytest.approx([evaluation.rouge_l.mean] * 3, abs=0.005)
    assert max(map(len, shown(rows).splitlines())) <= 80


def test_table_fits_80_columns(evaluation: Evaluation) -> None:
    """The table fits into a terminal of 80 columns. Long names may wrap, but numbers are neither wrapped nor cut."""
    assert evaluation.rouge_l is not None
    wide = replace(evaluation.rouge_l, mean=98.76, std=2.34, interval=(97.6, 99.9))
    wide = replace(evaluation, rouge_l=wide, exact_match=wide, greedy_exact_match=wide)
    rows = {"self_instruct-test": wide, "vicuna-questions": wide}
    lines = shown(rows).splitlines()
    for name, *numbers in list(zip(*(one.cells for one in evaluation_table(rows).columns), strict=True))[: len(rows)]:
        assert "98.76 ± 2.34" in numbers
        assert any(line.split()[1:] == " ".join(map(str, numbers)).split() for line in lines), name
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 80


def test_a_set_without_references_is_answered_without_scores(tmp_path: Path) -> None:
    """A test set without references, such as Vicuna's, is answered without scores."""
    rows = [Example(0, "How?"), Example(1, "Why?")]
    evaluation = evaluated(rows, seeds=1)
    write_evaluation(evaluation, tmp_path / "x.json")
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert (written["rouge_l"], written["greedy_exact_match"], written["bits_per_byte"]) == (None, None, None)
    assert written["signature"]["references"] == "none"
    answers = [json.loads(line) for line in (tmp_path / "x.answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["rouge_l"]) for line in answers] == [(0, None), (1, None), (0, None), (1, None)]
    text = shown({"vicuna": evaluation})
    for heading in (
        "ROUGE-L sampled",
        "95 % interval",
        "ROUGE-L greedy",
        "exact sampled",
        "exact greedy",
        "bits per byte",
    ):
        assert column({"vicuna": evaluation}, heading) == ["-"], heading
    assert "no references: answers without scores" in text
    assert "mean of" not in text


def test_scores_that_are_not_finite_are_not_written(evaluation: Evaluation, tmp_path: Path) -> None:
    """Scores that are NaN, which JSON cannot represent, raise an error."""
    assert evaluation.rouge_l is not None
    broken = replace(evaluation, rouge_l=replace(evaluation.rouge_l, mean=float("nan")))
    with pytest.raises(UserError, match=r"x\.json .*NaN"):
        write_evaluation(broken, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_answers_never_stay_beside_the_numbers_of_others(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge and reports would attribute the answers to another model, or read them with other options."""
    path = tmp_path / "test.json"
    write_evaluation(evaluation, path)
    write_evaluation(replace(evaluation, answers=()), path)
    assert [file.name for file in tmp_path.iterdir()] == ["test.json"]
    monkeypatch.setattr("dwakd.evaluation.report.write_file", lambda file, data: file.write_bytes(data) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_evaluation(evaluation, path)
    assert [file.name for file in tmp_path.iterdir()] == ["test.answers.jsonl"]
