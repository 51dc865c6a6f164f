"""Test the sections of models, data, evaluation and comparison."""

import pytest

from dwakd.errors import UserError
from dwakd.recipe.sections import CompareSection, DataSection, EvaluationSection, StudentSection, lora_config
from dwakd.validation import Section, parse


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (StudentSection, {"model": "x", "dtype": "float12"}, r"dtype must be 'float32', .*did you mean float32"),
        (StudentSection, {"model": "x", "trust_remote_code": "yes"}, "trust_remote_code must be true or false"),
        (StudentSection, {"model": "x", "peft": True}, "peft must be a section with options"),
        (StudentSection, {"model": "x", "peft": {"rank": 4}}, r"unknown option student\.peft\.rank"),
        (StudentSection, {"model": "x", "peft": {"r": "4"}}, r"^student\.peft\.r must be a whole number"),
        (StudentSection, {"model": "x", "peft": {1: 2}}, r"peft\.1"),
        (StudentSection, {"model": "x", "peft": {"layers_pattern": "h"}}, r"peft: .*layers_to_transform"),
        (DataSection, {"train": "x", "max_length": "long"}, "max_length must be a whole number, got 'long'"),
        (DataSection, {"train": "x", "max_prompt_length": 0}, "max_prompt_length must be at least 1"),
        (DataSection, {"train": "x", "eval_limit": 0}, "eval_limit must be at least 1"),
        (DataSection, {"train": "x", "template": "alpacca"}, r"data\.template 'alpacca' is unknown: use "),
        (DataSection, {"train": "x", "bos": "always"}, "bos must be 'auto' or 'never', got 'always'"),
        (DataSection, {"train": "x", "invalid_rows": "skp"}, "did you mean skip"),
        (EvaluationSection, {"seeds": 0}, "seeds must be at least 1"),
        (EvaluationSection, {"test": "x.jsonl"}, "test must be a list, got 'x.jsonl'"),
        (EvaluationSection, {"test": [3]}, r"test\.1 must be text"),
        (CompareSection, {"rows": {"dskd": 3}}, r"rows\.dskd must be a section with options"),
    ],
)
def test_mistakes_are_named(section: type[Section], values, message):
    """Invalid values are refused with the name of the option before models are loaded."""
    with pytest.raises(UserError, match=message):
        parse(section, values)


def test_peft_options_become_a_lora_config():
    """The options of `student.peft` become a LoraConfig, nested options and those of several types included."""
    options = {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 8}, "init_lora_weights": "pissa"}
    assert parse(StudentSection, {"model": "x", "peft": options}).peft == options
    config = lora_config(options)
    assert (config.r, config.task_type, config.rank_pattern) == (4, "CAUSAL_LM", {"q_proj": 8})
