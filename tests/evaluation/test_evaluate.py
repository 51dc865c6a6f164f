"""What `dwakd eval` reports and writes."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte
from dwakd.evaluation.evaluate import Evaluation, data_identity, evaluate_model, model_identity
from dwakd.evaluation.generate import generate_answers
from dwakd.evaluation.metrics import exact_match, rouge_l, summarise
from dwakd.evaluation.options import EvalOptions, GenerationOptions
from dwakd.evaluation.report import evaluation_table, write_evaluation
from tests.builders import byte_bpe, tiny_model

EXAMPLES = [
    Example(4, "Name three colours.", response="Red, green and blue.", references=("Red, green and blue.", "e")),
    Example(5, "Привет!", response="a 1"),
]


def evaluated(model: Any, encoder: TextEncoder, examples: list[Example], **options: Any) -> Evaluation:
    """The evaluation with short answers, without progress bars."""
    return evaluate_model(model, encoder, examples, EvalOptions(**{"max_new_tokens": 12, **options}), progress=False)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_bpe(), "plain")


@pytest.fixture(scope="module")
def evaluation(encoder: TextEncoder) -> Evaluation:
    return evaluated(tiny_model("llama", 400), encoder, EXAMPLES, seeds=2)


def test_numbers_are_those_of_the_parts(evaluation: Evaluation, encoder: TextEncoder) -> None:
    """Answers scored against another row's references, or seeds mixed up, would go unnoticed in the mean."""
    model, references = tiny_model("llama", 400), [EXAMPLES[0].references, ("a 1",)]
    *sampled, greedy = (
        generate_answers(model, encoder, EXAMPLES, GenerationOptions(seed=seed, max_new_tokens=12), progress=False)
        for seed in (10, 20, None)
    )
    assert evaluation.rouge_l == summarise([rouge_l(answers, references) for answers in sampled])
    assert evaluation.exact_match == summarise([exact_match(answers, references) for answers in sampled])
    assert evaluation.greedy_rouge_l == summarise([rouge_l(greedy, references)])
    assert evaluation.bits_per_byte == bits_per_byte(model, encoder, EXAMPLES)
    assert [answer.answer for answer in evaluation.answers] == [*sampled[0], *sampled[1], *greedy]


def test_files_carry_signature_and_answers(evaluation: Evaluation, tmp_path: Path) -> None:
    """A number without the way it was got cannot be compared with anyone else's."""
    json_path, answers_path = tmp_path / "new" / "eval.json", tmp_path / "new" / "answers.jsonl"
    write_evaluation(evaluation, json_path, answers_path)
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
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["answers.jsonl", "eval.json"]


def test_passes_can_be_left_out(encoder: TextEncoder) -> None:
    """A greedy-only dev evaluation must not report a sampled score, nor bits where there is no response."""
    asked = [Example(0, "Hi", references=("Hello",))]
    model = tiny_model("llama", 400)
    only_greedy = evaluated(model, encoder, asked, do_sample=False)
    assert only_greedy.rouge_l is None
    assert only_greedy.bits_per_byte is None
    assert only_greedy.greedy_rouge_l is not None
    with pytest.raises(UserError, match="no rows"):
        evaluated(model, encoder, [])


def test_a_prompt_without_room_shows_first(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits per byte of a large set take minutes, and leave such a row out with a warning only."""
    monkeypatch.setattr("dwakd.evaluation.evaluate.bits_per_byte", lambda *_, **__: pytest.fail("computed first"))
    small = tiny_model("llama", 400, max_position_embeddings=len(encoder.prompt_ids(EXAMPLES[0])))
    with pytest.raises(UserError, match=r"row 4 \(counting from 0\): its prompt"):
        evaluated(small, encoder, EXAMPLES)


def test_unscorable_references_are_told(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """On Russian or Chinese data every student has ROUGE-L 0: the user must hear why."""
    rows = [Example(0, "Hi", response="Привет"), Example(1, "Hi", response="ok")]
    with caplog.at_level(logging.WARNING, logger="dwakd.evaluation.evaluate"):
        evaluated(tiny_model("llama", 400), encoder, rows, do_sample=False)
    assert "1 of 2 rows" in caplog.text


def shown(rows: dict[str, Evaluation], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluation_table(rows))
    return capture.get()


def test_table_shows_spread_mean_and_signature(evaluation: Evaluation) -> None:
    """A table is what gets copied into a report: it must say how its numbers were got."""
    assert evaluation.rouge_l is not None
    assert evaluation.bits_per_byte is not None
    other = replace(evaluation, rouge_l=replace(evaluation.rouge_l, mean=evaluation.rouge_l.mean + 10))
    text = shown({"dolly": evaluation, "p3": other}, 500)
    assert f"{evaluation.rouge_l.mean:.2f} ± {evaluation.rouge_l.std:.2f}" in text
    assert text.count("seeds 10/20") == 1
    (mean,) = (line.split() for line in text.splitlines() if "mean of 2 sets" in line)
    assert mean[4] == f"{evaluation.rouge_l.mean + 5:.2f}", "unweighted mean over the sets"
    assert mean[-1] == f"{evaluation.bits_per_byte.value:.3f}"


def test_table_fits_80_columns(evaluation: Evaluation) -> None:
    """Numbers that wrap inside their cells cannot be read."""
    assert evaluation.rouge_l is not None
    wide = replace(evaluation.rouge_l, mean=98.76, std=2.34, interval=(97.6, 99.9))
    wide = replace(evaluation, rouge_l=wide, exact_match=wide, greedy_exact_match=wide)
    lines = shown({"self_instruct-test": wide, "vicuna-questions": wide}).splitlines()
    assert any("self_instruct-test" in line and "98.76 ± 2.34" in line and "97.6–99.9" in line for line in lines)
    assert any("vicuna-questions" in line and "98.76 ± 2.34" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_set_without_references_is_answered_without_scores(encoder: TextEncoder, tmp_path: Path) -> None:
    """The questions of Vicuna are for a judge: their answers are what is wanted, and a score of 0 would be false."""
    rows = [Example(0, "How?"), Example(1, "Why?")]
    evaluation = evaluated(tiny_model("llama", 400), encoder, rows, seeds=1)
    write_evaluation(evaluation, tmp_path / "x.json", tmp_path / "x.answers.jsonl")
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert (written["rouge_l"], written["greedy_exact_match"], written["bits_per_byte"]) == (None, None, None)
    assert written["signature"]["references"] == "none"
    answers = [json.loads(line) for line in (tmp_path / "x.answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["rouge_l"]) for line in answers] == [(0, None), (1, None), (0, None), (1, None)]
    text = shown({"vicuna": evaluation})
    assert next(line for line in text.splitlines() if line.strip().startswith("vicuna")).split()[1:] == ["-"] * 6
    assert "no references: answers without scores" in text
    assert "mean of" not in text


def test_signature_names_model_and_data(encoder: TextEncoder) -> None:
    """Without digests the scores of two checkpoints in one folder, or of an edited test set, look comparable."""
    model = tiny_model("llama", 400)
    identity = model_identity(model, "runs/a")
    assert identity["name"] == "runs/a"
    assert identity == model_identity(tiny_model("llama", 400), "runs/a")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] += 1e-3
    assert identity["sha256"] != model_identity(model)["sha256"]
    assert len(model_identity(model.to(torch.bfloat16))["sha256"]) == 16
    data = data_identity(EXAMPLES, "p3/test.jsonl")
    assert (data["name"], data["rows"]) == ("p3/test.jsonl", 2)
    assert data["sha256"] != data_identity([EXAMPLES[0], replace(EXAMPLES[1], response="a 2")])["sha256"]
    made = evaluated(tiny_model("llama", 400), encoder, EXAMPLES, do_sample=False).signature
    assert made["model"]["sha256"] == identity["sha256"]
    assert made["data"]["sha256"] == data["sha256"]
