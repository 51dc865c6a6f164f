"""Test what is uploaded to the Hugging Face Hub, against a hub that only records the commits."""

import concurrent.futures
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from dwakd import DistillTrainer
from dwakd.errors import UserError
from dwakd.recipe.recipe import load_recipe
from dwakd.training.run import train
from tests.training.builders import trainer


@pytest.fixture
def commits(monkeypatch):
    """Return the list of commits, each a dict of contents by path, that the hub receives."""
    received: list[dict[str, bytes]] = []

    def create_commit(self, repo_id, operations, *, run_as_future=False, **options):
        assert repo_id == "me/student"
        files = {}
        for one in operations:
            with one.as_file() as file:
                files[one.path_in_repo] = file.read()
        received.append(files)
        done = concurrent.futures.Future()
        done.set_result("commit")
        return done if run_as_future else "commit"

    repo = SimpleNamespace(repo_id="me/student")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *_, **__: repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return received


def test_a_student_is_uploaded_without_what_belongs_to_the_run(tmp_path, commits):
    """Student, tokenizer, card and trained maps are uploaded; optimiser, logs and checkpoints are not."""
    options = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_model_id": "me/student"}
    run = trainer(tmp_path, max_steps=2, **options)
    run.train()
    (during,) = commits
    (tmp_path / "events.out.tfevents").write_text("log")
    (tmp_path / "notes.pt").write_text("state")
    (tmp_path / "similarity.json").write_text(json.dumps({"teacher": str(tmp_path)}))  # dwakd report reads it here
    (tmp_path / "special_tokens_map.json").write_text("{}")
    run.push_to_hub(license="mit")
    wanted = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "distillation/maps.safetensors",
    }
    assert wanted <= during.keys()
    assert wanted | {"README.md", "special_tokens_map.json"} <= commits[1].keys()
    assert b"license: mit" in commits[1]["README.md"]
    for name in during.keys() | commits[1].keys():
        assert not name.endswith((".pt", ".pth", ".bin", "trainer_state.json", "similarity.json", ".tfevents")), name
        assert "checkpoint" not in name
    assert commits[1]["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_no_paths_of_this_machine_are_uploaded(workspace, tmp_path, commits):
    """Recipes and adapters name local files by absolute paths; on the hub these would reveal folders and user names."""
    overrides = ["training.push_to_hub=true", "training.hub_model_id=me/student", "student.peft={r: 2}"]
    run = train(load_recipe(workspace / "recipe.yaml", overrides), tmp_path / "run")
    files = commits[-1]
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "distillation/maps.safetensors",
        "README.md",
    } <= files.keys()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "student"
    for name, content in files.items():
        for place in (workspace, tmp_path, Path.home()):
            assert str(place).encode() not in content, name
    assert b"train: data.jsonl" in files["README.md"]
    assert str(workspace) in (tmp_path / "run" / "adapter_config.json").read_text()  # which loads the base model here
    run.push_card()
    assert list(commits[-1]) == ["README.md"]


def test_an_upload_that_fails(workspace, tmp_path, commits, monkeypatch):
    """A broken network must not cost the training; starting again with --resume uploads the finished student."""
    recipe = load_recipe(workspace / "recipe.yaml", ["training.push_to_hub=true", "training.hub_model_id=me/student"])
    with monkeypatch.context() as broken:
        broken.setattr(HfApi, "create_commit", lambda *_, **__: 1 / 0)
        with pytest.raises(UserError, match=r"could not upload the student in .*run \(division by zero\); check"):
            train(recipe, tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    monkeypatch.setattr(DistillTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    train(recipe, tmp_path / "run", resume=True)
    assert commits[-1]["model.safetensors"] == weights
    assert "README.md" in commits[-1]
