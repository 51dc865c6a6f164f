"""Test that runs are never mixed in one folder and that a run resumes from its newest complete checkpoint."""

import json
import re
from contextlib import ExitStack

import pytest

from dwakd.errors import UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.distiller import LOSS_STATE
from dwakd.training.run_folder import (
    RUN_FILE,
    alone_in,
    check_output,
    check_same_recipe,
    has_steps_left,
    is_finished,
    last_checkpoint,
)
from tests.training.builders import trainer


def recipe_of(**sections):
    """Return a recipe for a tiny run."""
    content = {"student": {"model": "x"}, "data": {"train": "rows.jsonl"}, "loss": {"method": "sft"}}
    return recipe_from_dict({**content, **sections})


def save_run(folder, recipe, step=3):
    """Write a finished run of a recipe, with the state of its trainer."""
    folder.mkdir()
    (folder / "dwakd-recipe.yaml").write_text(recipe.dump())
    (folder / RUN_FILE).write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_a_recipe_that_was_never_finished_is_no_run(tmp_path):
    """A run that was killed while its recipe was written starts again from the beginning."""
    (tmp_path / ".dwakd-recipe.yaml.tmp-1").write_text("student:")
    assert check_output(tmp_path, resume=False, recipe=recipe_of()) is None


def test_a_folder_with_anything_else_is_refused(tmp_path):
    """A folder with other files is refused, because a run would overwrite the user's files."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=rf"{tmp_path} is not empty"):
        check_output(tmp_path, resume=False, recipe=recipe_of())
    save_run(tmp_path / "run", recipe_of())
    with pytest.raises(UserError, match="--resume"):
        check_output(tmp_path / "run", resume=False, recipe=recipe_of())
    assert check_output(tmp_path / "run", resume=True, recipe=recipe_of()) is None


def test_the_option_that_differs_is_named(tmp_path):
    """A folder with the run of another recipe is refused, and the message names the option that differs."""
    teachers = [{"model": "a"}, {"model": "b"}]
    save_run(tmp_path / "run", recipe_of(teacher=teachers))
    saved, never = tmp_path / "run" / "dwakd-recipe.yaml", re.compile("$^")
    check_same_recipe(saved, recipe_of(teacher=teachers), changeable=never)
    other = recipe_of(teacher=[teachers[0], {"model": "c"}])
    with pytest.raises(UserError, match=r"teacher\.2\.model is b there and c here"):
        check_same_recipe(saved, other, changeable=never)
    check_same_recipe(saved, other, changeable=re.compile(r"teacher\."))
    longer = recipe_of(teacher=teachers, training={"max_steps": 9}, evaluation={"seeds": 1})
    assert check_output(tmp_path / "run", resume=True, recipe=longer) is None


def test_a_finished_run_continues_only_if_it_becomes_longer(tmp_path):
    """A finished run is trained again only if the recipe has more steps."""
    save_run(tmp_path / "run", recipe_of())
    assert is_finished(tmp_path / "run", recipe_of())
    assert not is_finished(tmp_path / "run", recipe_of(training={"max_steps": 9}))
    checkpoint = str(tmp_path / "run")
    assert has_steps_left(checkpoint, recipe_of())
    assert has_steps_left(checkpoint, recipe_of(training={"max_steps": 4}))
    assert not has_steps_left(checkpoint, recipe_of(training={"max_steps": 3}))
    with pytest.raises(UserError, match=r"step 3.*max_steps 2"):
        has_steps_left(checkpoint, recipe_of(training={"max_steps": 2}))
    (tmp_path / "run" / "trainer_state.json").write_text("{")
    assert not is_finished(tmp_path / "run", recipe_of())


def test_one_process_trains_in_a_folder(tmp_path):
    """A second process is refused while the first one trains in the folder."""
    folder = tmp_path / "run"
    with alone_in(folder), ExitStack() as second, pytest.raises(UserError, match=str(folder)):
        second.enter_context(alone_in(folder))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("lora", [False, True])
def test_a_damaged_checkpoint_is_skipped(tmp_path, lora, caplog):
    """If a file of a checkpoint is truncated, the checkpoint before it is used."""
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, lora=lora)
    run.train()
    (tmp_path / "checkpoint-foo").mkdir()
    newest = tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == str(newest)
    weights_file = "adapter_model.safetensors" if lora else "model.safetensors"
    torch_files = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in (weights_file, LOSS_STATE, *torch_files, "trainer_state.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:-10])
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert f"its {name} is damaged" in caplog.text
        (newest / name).unlink()
        if name != "rng_state.pth":
            assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        (newest / name).write_bytes(whole)
    assert last_checkpoint(tmp_path) == str(newest)
    assert "from the beginning" not in caplog.text
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / weights_file).unlink()
    assert last_checkpoint(tmp_path) is None
    assert "from the beginning" in caplog.text
