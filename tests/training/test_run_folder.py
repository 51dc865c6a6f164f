"""Test that runs are never mixed in one folder and that a run resumes from its newest complete checkpoint."""

import json
import os
import re
from contextlib import ExitStack

import pytest
import torch

from dwakd.checksums import CHECKSUMS, begin_checksums, write_checksums
from dwakd.errors import UserError
from dwakd.folders import UNFINISHED, alone_in
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training import run_folder
from dwakd.training.callbacks import ROWS_OF_STEP
from dwakd.training.run_folder import (
    RUN_FILE,
    check_output,
    check_same_recipe,
    has_steps_left,
    is_finished,
    last_checkpoint,
)
from tests.training.builders import assert_same, trainer, weights


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
    """A flipped byte in a tensor would otherwise change the student without a message; truncated files end a resumed run."""
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, lora=lora)
    run.train()
    (tmp_path / "checkpoint-foo").mkdir()
    newest = tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == str(newest)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    weights_file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert {weights_file, "maps.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} < {
        f.name for f in files
    }
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[-len(whole) // 3] ^= 1
        for content in (bytes(flipped), whole[:-10], whole[:0], None):
            path.unlink() if content is None else path.write_bytes(content)
            caplog.clear()
            assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
            if path.name != CHECKSUMS:
                assert f"its {path.relative_to(newest)} is {'missing' if content is None else 'damaged'}" in caplog.text
        path.write_bytes(whole)
    assert last_checkpoint(tmp_path) == str(newest)
    (newest / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be used: its optimizer\.pt is damaged"):
        run.train(resume_from_checkpoint=str(newest))
    begin_checksums(tmp_path / "checkpoint-1")
    caplog.clear()
    assert last_checkpoint(tmp_path) is None
    assert "checkpoint-1: it was not saved completely" in caplog.text
    assert "from the beginning" in caplog.text
    (newest / CHECKSUMS).unlink()
    with pytest.raises(UserError, match="older version of dwakd"):
        last_checkpoint(tmp_path)


def save_checkpoint(folder, *names):
    """Write a complete checkpoint of files with these names, and return its path."""
    for name in (*names, "model.safetensors", "trainer_state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    write_checksums(folder)
    return str(folder)


def test_checkpoints_of_deepspeed_are_complete(tmp_path, caplog):
    """A checkpoint of DeepSpeed has no scheduler.pt if DeepSpeed runs the schedule, because it saves the schedule itself."""
    ranks = ["rng_state_0.pth", "rng_state_1.pth"]
    found = save_checkpoint(tmp_path / "checkpoint-1", "latest", "global_step1/mp_rank_00_model_states.pt", *ranks)
    save_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == found
    assert "checkpoint-2: it contains no optimiser" in caplog.text, "save_only_model"


def test_save_total_limit_keeps_complete_checkpoints(tmp_path):
    """By the times of folders, the incomplete ones can be the newest: transformers would keep them and delete complete ones."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer(tmp_path, **options, max_steps=1).train()
    for step in (3, 9):
        begin_checksums(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (2**32, 2**32))
    (tmp_path / f".checkpoint-0{UNFINISHED}deleted").mkdir()
    resumed = trainer(tmp_path, **options, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that does not fit on the disk is removed, the one before it stays, and the message says what to do."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    run = trainer(tmp_path / "full", **options)
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"checkpoint-2 cannot be written .*--resume"):
            run.train()
    assert [path.name for path in (tmp_path / "full").glob("checkpoint*")] == ["checkpoint-1"]
    resumed = trainer(tmp_path / "full", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(whole))


def test_another_number_of_processes_needs_the_same_batch(tmp_path, monkeypatch):
    """Four processes with a batch of 2 continue as two with accumulation, but not with another number of rows in a step.

    A resumed run that ends before its first checkpoint has changed the recipe in the folder, not the rows of the checkpoint.
    """
    saved = {"per_device_train_batch_size": 2, "max_steps": 9}
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {ROWS_OF_STEP: 8}}))
    monkeypatch.setattr(run_folder, "last_checkpoint", lambda _: str(checkpoint))
    monkeypatch.setenv("WORLD_SIZE", "2")
    resumed, wrong = (recipe_of(training=saved | {"gradient_accumulation_steps": number}) for number in (2, 4))
    for in_folder in (recipe_of(training=saved), resumed):
        (tmp_path / "run" / "dwakd-recipe.yaml").write_text(in_folder.dump())
        assert check_output(tmp_path / "run", resume=True, recipe=resumed) == str(checkpoint)
        for recipe in (wrong, recipe_of(training=saved)):
            with pytest.raises(UserError, match=r"has 8 rows in a step, but this run with 2 processes has (16|4): set"):
                check_output(tmp_path / "run", resume=True, recipe=recipe)
