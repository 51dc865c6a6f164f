"""Test that names of TRL either work or are refused with a sentence that says what to write instead."""

import dataclasses
import inspect
import re
from typing import Any

import pytest

from dwakd import DistillConfig, DistillTrainer, UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.trl_names import INSTEAD, instead_of

FIELDS = {item.name for item in dataclasses.fields(DistillConfig)}


def recipe(section: str, **options: Any) -> None:
    base: dict[str, Any] = {"student": {"model": "x"}, "data": {"train": "x"}, "loss": {"method": "sft"}}
    recipe_from_dict({**base, section: {**base.get(section, {}), **options}})


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("packing", True, "max_tokens_per_batch"),
        ("max_seq_length", 512, "data.max_length"),
        ("completion_only_loss", True, "only the response is trained on"),
        ("dataset_text_field", "text", "prompt_column"),
        ("max_completion_length", 64, "max_new_tokens"),
        ("beta", 0.5, "method='gold'"),
        ("vllm_mode", "server", "in this process"),
        ("evaluation_strategy", "steps", "eval_strategy"),
        ("peft_config", {}, "student.peft"),
        ("teacher_model", "x", "teacher.model"),
    ],
)
def test_names_of_trl_say_what_to_write_instead(tmp_path, name, value, instead):
    """A user of TRL learns the replacement in Python and in a recipe, instead of a list of 140 names."""
    said = rf"{name} is not an option of dwakd: .*{re.escape(instead)}"
    with pytest.raises(UserError, match=f"^{said}"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(UserError, match=rf"^training\.{said}"):
        recipe("training", **{name: value})
    with pytest.raises(UserError, match=rf"^data\.{said}"):
        recipe("data", **{name: value})


def test_arguments_of_trainers(tmp_path):
    """Arguments of TRL's trainers, and misspelt ones, are refused before a model is loaded."""
    with pytest.raises(UserError, match="formatting_func is not an option of dwakd: use template"):
        DistillTrainer("no/model", formatting_func=str)
    with pytest.raises(UserError, match="unknown option train_data; did you mean train_dataset"):
        DistillTrainer("no/model", train_data=[])
    with pytest.raises(UserError, match="unknown option learning_rte; did you mean learning_rate"):
        DistillConfig(output_dir=str(tmp_path), learning_rte=1.0)


def test_the_table_holds_no_name_that_works():
    """A name that works in Python is not in the table, and every name that a sentence tells a user to write exists."""
    parameters = set(inspect.signature(DistillTrainer).parameters)
    elsewhere = {
        "callbacks",
        "chat_template_path",
        "model",
        "teacher_model",
        "peft_config",
    }  # arguments of one place that are written in another one
    assert not (FIELDS | parameters) & INSTEAD.keys() - elsewhere
    for text in INSTEAD.values():
        for name in re.findall(r"use (\w+_\w+)", text):
            assert name in FIELDS | parameters, text
    assert instead_of("learning_rate") is None


def test_options_of_a_method_keep_their_own_message():
    """`temperature` is an option of many methods, so a method without it is named, and not TRL's field."""
    with pytest.raises(UserError, match=r"unknown option loss\.temperature of method sft"):
        recipe("loss", temperature=2.0)


def test_warmup_ratio(tmp_path):
    """TRL's and earlier transformers' warmup_ratio gives as many steps of warmup as there."""
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, warmup_ratio=0.1)
    assert config.get_warmup_steps(200) == 20
    with pytest.raises(UserError, match="warmup_steps and warmup_ratio are both given"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, warmup_ratio=0.1, warmup_steps=3)
    recipe("training", warmup_ratio=0.1)
