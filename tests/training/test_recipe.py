"""What transformers and other packages refuse in a recipe is found before data and models are loaded."""

import re

import pytest

from dwakd.errors import UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.recipe import check_options, training_config


def recipe(**sections):
    content = {"student": {"model": "x"}, "data": {"train": "x"}, "loss": {"method": "sft"}, **sections}
    return recipe_from_dict(content | {"training": {"use_cpu": True, **content.get("training", {})}})


MISTAKES = {
    "schedule": ({"lr_scheduler_type": "fancy"}, "training options: .*fancy"),
    "optimiser that is not installed": ({"optim": "adamw_bnb_8bit"}, r"training\.optim: .*bitsandbytes"),
    "optimiser of another package": ({"optim": "galore_adamw"}, r"training\.optim: .*galore_torch"),
    "schedule without its option": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        r"training\.lr_scheduler_type: .*min_lr",
    ),
    "option of a schedule": (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"foo": 1}},
        r"training\.lr_scheduler_type: .*foo",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refused_options_are_named(name):
    """Most of them would show only when the training begins."""
    options, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        check_options(recipe(training=options), "unused")
    assert re.search(message, str(caught.value))


def test_sections_become_training_arguments():
    """An option that a recipe accepts and nothing reads changes nothing in the training."""
    data = {"train": "x", "eval": "y", "template": "chat", "max_length": 99, "invalid_rows": "skip"}
    teachers = [{"model": "a", "weight": 3}, {"model": "b"}]
    read = recipe(
        data=data, teacher=teachers, loss={"method": "uld", "uld_weight": 2}, training={"learning_rate": 1e-5}
    )
    config = training_config(read, "folder")
    assert (config.output_dir, config.method, config.loss_options) == ("folder", "uld", {"uld_weight": 2})
    assert (config.template, config.max_length, config.invalid_rows) == ("chat", 99, "skip")
    assert (config.teacher_weights, config.learning_rate) == ([3, 1], 1e-5)
    assert (config.eval_strategy, config.save_strategy) == ("epoch", "epoch")
    steps = training_config(recipe(data=data, training={"eval_strategy": "steps", "eval_steps": 5}), "folder")
    assert (steps.eval_strategy, steps.save_strategy) == ("steps", "steps")
    assert training_config(recipe(), "folder").eval_strategy == "no"
