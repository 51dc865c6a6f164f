"""Samples of a loaded teacher: their number, their seeds and their independence of shards."""

import pytest

from dwakd import UserError, load_examples
from dwakd.answers import GenerateSection, answer_prompts
from dwakd.answers.local import LocalTeacher
from dwakd.data.encoding import TextEncoder
from tests.answers.builders import PROMPTS, TOKENIZER, teacher

ROWS = [{"prompt": prompt} for prompt in PROMPTS[:10]]


def texts(**options):
    """Return the kept answers by number of the prompt and number of the sample."""
    section = GenerateSection(**{"max_new_tokens": 12, **options})
    answered = answer_prompts(teacher(), TOKENIZER, ROWS, section, template="plain", progress=False)
    return {(row["prompt_number"], row["sample"]): row["completion"] for row in answered}


def test_samples_differ_and_can_be_repeated():
    """Equal samples would only repeat a row; sample i of one run is the answer of a run with that seed."""
    three = texts(samples=3, temperature=1.0, seed=4)
    assert {sample for _, sample in three} == {0, 1, 2}
    assert len(set(three.values())) > 10
    second = texts(temperature=1.0, seed=5)
    assert second == {(row, 0): text for (row, sample), text in three.items() if sample == 1}
    assert second != texts(temperature=0.7, seed=5)
    assert second != texts(temperature=1.0, seed=5, top_p=0.5)
    assert texts(max_new_tokens=3, temperature=1.0, seed=5) != second
    with pytest.raises(UserError, match="samples above 1 requires a temperature above 0"):
        GenerateSection(samples=2)


def test_an_answer_does_not_depend_on_its_shard():
    """Prompts of two shards would otherwise get the same random numbers, and other shards would give other answers."""
    options = GenerateSection(temperature=1.0, max_new_tokens=12)
    local = LocalTeacher(teacher(), TextEncoder(TOKENIZER, "plain"), options)
    examples = load_examples([ROWS[0]] * 6, need_response=False)
    whole = local.answer(0, examples, lambda count: None)
    assert len({answers[0].text for answers in whole}) > 3
    assert local.answer(4, examples[4:], lambda count: None) == whole[4:]


def test_a_teacher_of_nan_is_refused():
    """In half precision some models overflow; their answers would be the first token of the vocabulary."""
    broken = teacher()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"NaN: check its weights, .*teacher\.dtype"):
        answer_prompts(broken, TOKENIZER, ROWS, progress=False)
