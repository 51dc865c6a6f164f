"""Test the scores of one model on one test set, and their signature."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte
from dwakd.evaluation.evaluate import Evaluation, SampledScores, data_identity, evaluate_model, model_identity
from dwakd.evaluation.generate import generate_answers
from dwakd.evaluation.metrics import exact_match, rouge_l, summarise
from dwakd.evaluation.options import EvalOptions, GenerationOptions
from tests.builders import byte_bpe, tiny_model

EXAMPLES = [
    Example(4, "Name three colours.", response="Red, green and blue.", references=("Red, green and blue.", "e")),
    Example(5, "Привет!", response="a 1"),
]


def evaluated(model: Any, encoder: TextEncoder, examples: list[Example], **options: Any) -> Evaluation:
    """Evaluate with short answers and without progress bars."""
    return evaluate_model(model, encoder, examples, EvalOptions(**{"max_new_tokens": 12, **options}), progress=False)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_bpe(), "plain")


@pytest.fixture(scope="module")
def evaluation(encoder: TextEncoder) -> Evaluation:
    return evaluated(tiny_model("llama", 400), encoder, EXAMPLES, seeds=2)


def test_numbers_are_those_of_the_parts(evaluation: Evaluation, encoder: TextEncoder) -> None:
    """Each score of the evaluation equals the score of that answer alone, compared with the references of the same row."""
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


def test_each_temperature_has_its_own_scores(evaluation: Evaluation, encoder: TextEncoder) -> None:
    """Scores that mix temperatures, or exchange them, would hide how much of a gain is sharpness."""
    model = tiny_model("llama", 400)
    both = evaluated(model, encoder, EXAMPLES, seeds=2, temperatures=[1.0, 0.2])
    cold = evaluated(model, encoder, EXAMPLES, seeds=2, temperatures=[0.2])
    assert (both.rouge_l, both.exact_match) == (evaluation.rouge_l, evaluation.exact_match)
    assert both.other_temperatures == {"0.2": SampledScores(cold.rouge_l, cold.exact_match)}
    assert both.greedy_rouge_l == evaluation.greedy_rouge_l
    pairs = [(answer.temperature, answer.seed) for answer in both.answers[::2]]
    assert pairs == [(1.0, 10), (1.0, 20), (0.2, 10), (0.2, 20), (None, None)]
    assert [answer.answer for answer in both.answers[4:8]] == [answer.answer for answer in cold.answers[:4]]
    assert both.answers[4].answer != both.answers[0].answer
    assert both.signature["temperature"] == [1.0, 0.2]
    assert both.signature["seeds"] == [10, 20]
    assert evaluation.signature["temperature"] == 1.0


def test_decoding_is_part_of_the_signature(evaluation: Evaluation, encoder: TextEncoder) -> None:
    """The ban of repeated n-grams changes ROUGE-L by about a point; signatures without it stay as they were."""
    model = tiny_model("llama", 400)
    made = evaluated(model, encoder, EXAMPLES, do_sample=False, decoding="minillm")
    assert made.signature["no_repeat_ngram_size"] == 6
    assert "no_repeat_ngram_size" not in evaluation.signature
    greedy = GenerationOptions(seed=None, max_new_tokens=12, no_repeat_ngram_size=6)
    assert [answer.answer for answer in made.answers] == generate_answers(
        model, encoder, EXAMPLES, greedy, progress=False
    )


def test_passes_can_be_left_out(encoder: TextEncoder) -> None:
    """With greedy answers only, there are no sampled scores, and without a response there are no bits per byte."""
    asked = [Example(0, "Hi", references=("Hello",))]
    model = tiny_model("llama", 400)
    only_greedy = evaluated(model, encoder, asked, do_sample=False)
    assert only_greedy.rouge_l is None
    assert only_greedy.bits_per_byte is None
    assert only_greedy.greedy_rouge_l is not None
    with pytest.raises(UserError, match="no rows"):
        evaluated(model, encoder, [])


def test_a_prompt_without_room_is_refused_first(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts without room for an answer are refused before bits per byte are computed, which takes minutes."""
    monkeypatch.setattr("dwakd.evaluation.evaluate.bits_per_byte", lambda *_, **__: pytest.fail("computed first"))
    small = tiny_model("llama", 400, max_position_embeddings=len(encoder.prompt_ids(EXAMPLES[0])))
    with pytest.raises(UserError, match=r"row 4 \(counting from 0\): its prompt"):
        evaluated(small, encoder, EXAMPLES)


def test_unscorable_references_cause_a_warning(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """A warning explains why ROUGE-L is 0 on references without the letters a to z and digits."""
    rows = [Example(0, "Hi", response="Привет"), Example(1, "Hi", response="ok")]
    with caplog.at_level(logging.WARNING, logger="dwakd.evaluation.evaluate"):
        evaluated(tiny_model("llama", 400), encoder, rows, do_sample=False)
    assert "1 of 2 rows" in caplog.text


def test_signature_names_model_and_data(encoder: TextEncoder) -> None:
    """The signature contains digests of the weights and of the test set."""
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
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    assert data_identity(load_examples(chat))["sha256"] == "22592c93b9584421", "as in version 0.2, for its results"
    made = evaluated(tiny_model("llama", 400), encoder, EXAMPLES, do_sample=False).signature
    assert made["model"]["sha256"] == identity["sha256"]
    assert made["data"]["sha256"] == data["sha256"]
