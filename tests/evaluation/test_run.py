"""What a recipe or a call of `dwakd eval` evaluates is read and validated before hours of training or answering."""

import json
from pathlib import Path
from typing import Any

import pytest

from dwakd.config import recipe_from_dict
from dwakd.errors import UserError
from dwakd.evaluation.run import plan_evaluation


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("option", ["seeds", "max_new_tokens", "batch_size", "limit"])
def test_options_below_one_are_refused_by_name(option: str, tmp_path: Path) -> None:
    """A recipe without seeds, tokens or rows would fail or answer nothing after the training."""
    test = write(tmp_path / "test.jsonl", [{"prompt": "2 + 2 =", "response": "4"}])
    section = {"test": [test], option: 0}
    recipe = recipe_from_dict({"student": {"model": "x"}, "data": {"train": test}, "evaluation": section})
    with pytest.raises(UserError, match=rf"^evaluation\.{option} .*got 0"):
        plan_evaluation(recipe)


def test_the_sets_and_options_of_a_recipe_are_read(tmp_path: Path) -> None:
    """A test file that is missing must stop the training before it begins."""
    content: dict[str, Any] = {"student": {"model": "x"}, "data": {"train": "unused", "prompt": "q", "response": "a"}}
    test = write(tmp_path / "test.jsonl", [{"q": "2 + 2 =", "a": "4"}] * 3)
    section = {"test": [test], "limit": 2, "seeds": 3, "max_new_tokens": 7, "batch_size": 5}
    plan = plan_evaluation(recipe_from_dict({**content, "evaluation": section}))
    assert [len(item.examples) for item in plan.sets] == [2]
    assert (plan.options.seeds, plan.options.max_new_tokens, plan.options.batch_size) == (3, 7, 5)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        plan_evaluation(recipe_from_dict({**content, "evaluation": {"test": ["nowhere.jsonl"]}}))
