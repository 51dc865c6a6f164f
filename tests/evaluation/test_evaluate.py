"""What `dwakd eval` reports and writes."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte
from dwakd.evaluation.evaluate import Evaluation, evaluate_model, evaluation_table, write_evaluation
from dwakd.evaluation.generate import generate_answers
from dwakd.evaluation.rouge import exact_match, rouge_l
from dwakd.evaluation.summary import summarise
from tests.builders import byte_bpe, tiny_model

EXAMPLES = [
    Example(4, "Name three colours.", response="Red, green and blue.", references=("Red, green and blue.", "e")),
    Example(5, "Привет!", response="a 1"),
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "progress": False}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_bpe(), "plain")


@pytest.fixture(scope="module")
def evaluation(encoder: TextEncoder) -> Evaluation:
    return evaluate_model(tiny_model("llama", 400), encoder, EXAMPLES, seeds=(10, 20), **OPTIONS)


def test_numbers_are_those_of_the_parts(evaluation: Evaluation, encoder: TextEncoder) -> None:
    """Answers scored against another row's references, or seeds mixed up, would go unnoticed in the mean."""
    model, references = tiny_model("llama", 400), [EXAMPLES[0].references, ("a 1",)]
    sampled = [generate_answers(model, encoder, EXAMPLES, seed=seed, **OPTIONS) for seed in (10, 20)]
    greedy = generate_answers(model, encoder, EXAMPLES, seed=0, do_sample=False, **OPTIONS)
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
    only_greedy = evaluate_model(model, encoder, asked, do_sample=False, **OPTIONS)
    assert only_greedy.rouge_l is None
    assert only_greedy.bits_per_byte is None
    assert only_greedy.greedy_rouge_l is not None
    with pytest.raises(UserError, match="pass"):
        evaluate_model(model, encoder, asked, do_sample=False, greedy=False, **OPTIONS)
    with pytest.raises(UserError, match="seeds"):
        evaluate_model(model, encoder, asked, seeds=(10, 10), **OPTIONS)
    with pytest.raises(UserError, match="no rows"):
        evaluate_model(model, encoder, [], **OPTIONS)


def test_unscorable_references_are_told(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """On Russian or Chinese data every student has ROUGE-L 0: the user must hear why."""
    rows = [Example(0, "Hi", response="Привет"), Example(1, "Hi", response="ok")]
    with caplog.at_level(logging.WARNING, logger="dwakd.evaluation.evaluate"):
        evaluate_model(tiny_model("llama", 400), encoder, rows, do_sample=False, **OPTIONS)
    assert "1 of 2 rows" in caplog.text


def test_table_shows_spread_interval_and_signature(evaluation: Evaluation) -> None:
    """A table is what gets copied into a report: it must say how its numbers were got."""
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluation_table({"teacher": evaluation, "student": evaluation}))
    text = capture.get()
    assert evaluation.rouge_l is not None
    assert f"{evaluation.rouge_l.mean:.2f} ± {evaluation.rouge_l.std:.2f}" in text
    assert "student" in text
    assert text.count("seeds 10/20") == 1
