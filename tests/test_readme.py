"""Test that the examples of the README run unchanged."""

import re
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM

from dwakd.compare.plan import variants_of
from dwakd.losses import METHODS
from dwakd.losses.divergences import DIVERGENCES
from dwakd.recipe.files import parse_yaml
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.run import training_config
from tests.builders import byte_bpe, tiny_model, unigram_byte_fallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {"instruction": ["Say hello.", "Add."], "context": ["", "1 and 2"], "response": ["Hello.", "3"]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_example(tmp_path, monkeypatch):
    """The Python example runs. Local folders stand for the models and the data set of the hub."""
    monkeypatch.chdir(tmp_path)
    for name, family, tokenizer in (
        ("HuggingFaceTB/SmolLM2-135M", "llama", byte_bpe()),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2", unigram_byte_fallback()),
    ):
        tiny_model(family, len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    loaded = []

    def load_dataset(name, *args, **kwargs):
        loaded.append(name)
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    exec(blocks("python")[0], {})
    assert loaded == ["databricks/databricks-dolly-15k"]
    assert AutoModelForCausalLM.from_pretrained("student").config.model_type == "llama"


def test_own_training_loop():
    """The training loop runs with any two models, and gradient reaches the student."""
    student_tokenizer, teacher_tokenizer = byte_bpe(), unigram_byte_fallback()
    student = tiny_model("llama", len(student_tokenizer))
    names = {
        "rows": [{"prompt": "Say hello.", "response": "Hello."}, {"prompt": "1 and 2?", "response": "3"}],
        "student": student,
        "teacher": tiny_model("qwen2", len(teacher_tokenizer)),
        "student_tokenizer": student_tokenizer,
        "teacher_tokenizer": teacher_tokenizer,
    }
    exec(blocks("python")[1], names)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_recipe():
    """The recipe is valid."""
    recipe, compare = map(parse_yaml, blocks("yaml"))
    read = recipe_from_dict(recipe)
    assert training_config(read, "unused").learning_rate == pytest.approx(1e-3)
    read = recipe_from_dict(recipe | compare, "compare")
    rows = {row.name: row.recipe(read).method for row in variants_of(read, read.compare, ablation=False)}
    assert rows == {"sft": "sft", "dwa_kd": "dwa_kd", "seqkd": "sft", "sum": "sum"}


def test_commands_exist():
    """Every `dwakd` command and `make` target in the README exists."""
    from dwakd.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^dwakd (\w+)", README, re.M)) <= names
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_methods_and_divergences_are_listed():
    """The README's table has a row for each method, and docs/methods.md names each divergence in the section `kd`."""
    (table,) = re.findall(r"^## Methods\n(.*?)^## ", README, re.M | re.S)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == sorted(METHODS)
    (section,) = re.findall(
        r"^## kd\n(.*?)^## ", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert set(DIVERGENCES) <= set(re.findall(r"`(\w+)`", section))
