"""Test the guarantees of SECURITY.md that no other test covers."""

import json
import pickle
import shutil

import pytest
import torch
import yaml

from dwakd.checksums import write_checksums
from dwakd.compare.plan import variants_of
from dwakd.errors import UserError
from dwakd.models.loading import load_causal_lm
from dwakd.recipe.recipe import recipe_from_dict
from tests.builders import byte_bpe
from tests.command_line import make_workspace, one_sentence, run
from tests.training.builders import trainer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the checkpoint of a run after two steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, method="sft", max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def test_the_pickle_of_a_model_is_not_executed(tmp_path, checkpoint):
    """A model from the hub may contain any pickle instead of safetensors."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    with pytest.raises(UserError):
        load_causal_lm(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_the_pickles_of_a_checkpoint_are_not_executed(tmp_path, checkpoint, name):
    """Checkpoints contain files of torch. They are read with weights_only, or not at all."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    torch.save({"state": Payload(tmp_path / "ran")}, folder / name)
    write_checksums(folder)  # as an attacker would
    again = trainer(tmp_path, method="sft", max_steps=3)
    if name == "training_args.bin":
        again.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            again.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "ran").exists()


def test_chat_templates_cannot_reach_python(tmp_path, monkeypatch, capsys):
    """A chat template is a program of the model's author. It runs in transformers' sandbox, and texts are not templates."""
    folder = make_workspace(tmp_path)
    rows = [{"prompt": "{{ 7 * 7 }} {% raw %}", "response": "{{ 6 * 7 }}"}] * 4
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["data.template=chat", "loss.method=sft", "-o"]
    for template, fault in (
        (CHAT, None),
        ("{{ messages.__class__.__mro__ }}" + CHAT, "is unsafe"),
        ("{{ open }}" + CHAT, None),
    ):
        tokenizer = byte_bpe()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / "student")
        code, out, err = run(monkeypatch, capsys, "inspect", folder / "recipe.yaml", *options[:-1])
        assert (code == 0) == (fault is None), err
        if fault:
            assert fault in one_sentence(err)
        else:
            assert "7 * 7" in out
            assert "built-in function" not in out


def test_rows_of_a_comparison_stay_in_its_folder():
    """The name of a row is the name of its folder."""
    content = {"student": {"model": "s"}, "data": {"train": "x.jsonl"}, "loss": {"method": "sft"}}
    for name in ("../up", "/abs", "a/b", "..", "a\\b"):
        recipe = recipe_from_dict({**content, "compare": {"rows": {name: {}}}}, "compare")
        with pytest.raises(UserError, match=r"compare\.rows"):
            variants_of(recipe, recipe.compare, ablation=False)


def test_secrets_are_neither_stored_nor_printed(tmp_path, monkeypatch, capsys):
    """Tokens are read from the environment. The folder of a run is shared with others, and its recipe refuses tokens."""
    folder, secret = make_workspace(tmp_path), "s3cr3t-0123456789"
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    code, out, err = run(monkeypatch, capsys, "train", folder / "recipe.yaml", "-o", tmp_path / "run")
    assert code == 0, err
    assert secret not in out + err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path.name for path in files if secret.encode() in path.read_bytes()]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    endpoint = {"base_url": f"http://user:{secret}@host/v1", "model": "m"}
    served = {"url": endpoint["base_url"], "model": "m"}
    for changes in (
        {"training": {"hub_token": secret}},
        {"teacher": {"model": "teacher", "cache": f"ftp://user:{secret}@host/cache"}},
        {"evaluation": {"test": ["test.jsonl", f"https://user:{secret}@host/test.jsonl"]}},
        {"generate": {"endpoint": endpoint}},
        {"teacher": served, "loss": {"method": "alm"}},
    ):
        with pytest.raises(UserError, match=r"HF_TOKEN|OPENAI_API_KEY|must not contain a password") as error:
            recipe_from_dict({**recipe, **changes}, "train")
        assert secret not in str(error.value)
