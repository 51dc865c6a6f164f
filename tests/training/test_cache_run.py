"""Test `dwakd cache`, and `teacher.cache` in a recipe."""

import json

import pytest
import yaml

from tests.builders import byte_bpe, tiny_model
from tests.cache.builders import LONG, save_teacher
from tests.command_line import one_sentence, run


@pytest.fixture
def recipe(tmp_path):
    """Return a recipe with two tiny models and a data file, whose cache does not exist yet."""
    tokenizer = byte_bpe()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    save_teacher(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in LONG))
    (tmp_path / "valid.jsonl").write_text("\n".join(json.dumps(row) for row in LONG[:3]))
    content = {
        "student": {"model": str(tmp_path / "student")},
        "teacher": {"model": str(tmp_path / "teacher"), "cache": str(tmp_path / "cache")},
        "data": {"train": str(tmp_path / "data.jsonl"), "eval": str(tmp_path / "valid.jsonl"), "template": "plain"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_build_check_and_train(recipe, tmp_path, monkeypatch, capsys):
    """A cache is built, verified and used for training. If one byte of it changes, each command names the damaged shard."""
    code, out, err = run(monkeypatch, capsys, "cache", recipe)
    assert code == 0, err
    assert "teacher.cache=" in out.replace(": ", "=")
    assert "response tokens of 128 bytes" in err, "the size is shown before the build starts"
    assert "free" in err
    for what in (recipe, tmp_path / "cache"):
        code, out, err = run(monkeypatch, capsys, "cache", what, "--check")
        assert code == 0, err
        assert "is complete" in out
    code, _, err = run(monkeypatch, capsys, "train", recipe, "-o", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "dwakd-run.json").read_text())["teacher_caches"] == [str(tmp_path / "cache")]

    shard = tmp_path / "cache" / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    for arguments in (
        ["train", recipe, "-o", tmp_path / "other"],
        ["cache", recipe, "--check"],
        ["cache", tmp_path / "cache", "--check"],
    ):
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2
        assert "shard-00001.safetensors" in one_sentence(err)
        assert "checksum" in one_sentence(err)
    assert not (tmp_path / "other").exists()
    code, _, err = run(monkeypatch, capsys, "cache", recipe)
    assert code == 0, err
    assert shard.read_bytes() == data

    code, _, err = run(monkeypatch, capsys, "train", recipe, "data.template=alpaca", "-o", tmp_path / "other")
    assert code == 2
    assert "data.template is 'plain' in the cache and 'alpaca' here" in one_sentence(err)
    rows = [dict(row) for row in LONG]
    rows[7]["response"] = "Changed."
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for command in (["train", recipe, "-o", tmp_path / "other"], ["cache", recipe], ["cache", recipe, "--check"]):
        code, _, err = run(monkeypatch, capsys, *command)
        assert code == 2
        assert "row 7 (counting from 0) of" in one_sentence(err)
        assert "data.jsonl has changed" in one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache", "RECIPE", "teacher.cache=null"], "teacher.cache is missing"),
        (["cache", "RECIPE", "teacher=null"], "add a teacher section"),
        (["cache", "FOLDER"], "is a folder"),
        (["cache", "RECIPE", "--check"], "is not a teacher cache"),
        (["cache", "RECIPE", "--check", "--engine", "vllm"], "--engine has no effect with --check"),
        (["cache", "RECIPE", "teacher.cache_dtype=int4"], "cache_dtype must be 'float32', 'bfloat16' or 'float16'"),
        (["train", "RECIPE", "training.teacher_cache=x"], "training.teacher_cache does not belong"),
    ],
)
def test_mistakes(arguments, message, recipe, tmp_path, monkeypatch, capsys):
    """Each mistake gives one sentence and creates no folder."""
    monkeypatch.chdir(tmp_path)
    paths = {"RECIPE": recipe, "FOLDER": tmp_path}
    code, _, err = run(monkeypatch, capsys, *(paths.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in one_sentence(err)
    assert not (tmp_path / "cache").exists()


def test_a_recipe_without_a_cache_yet(recipe, tmp_path, monkeypatch, capsys):
    """`dwakd train` builds a missing cache, and --output gives the folder if the recipe does not."""
    code, _, err = run(monkeypatch, capsys, "train", recipe, "-o", tmp_path / "run")
    assert code == 0, err
    assert (tmp_path / "cache" / "cache.json").is_file()
    arguments = ["cache", recipe, "teacher.cache=null", "teacher.cache_dtype=bfloat16", "-o", tmp_path / "half"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "bfloat16" in out
    code, _, err = run(monkeypatch, capsys, "train", recipe, f"teacher.cache={tmp_path / 'half'}", "-o", tmp_path / "r")
    assert code == 0, err


def test_a_method_that_reads_attention_can_be_cached_for_others_only(recipe, tmp_path, monkeypatch, capsys):
    """`dwakd compare` may build a cache although one method reads attention, but a run of this method refuses it."""
    code, _, err = run(monkeypatch, capsys, "cache", recipe, "loss.method=sra")
    assert (code, "set loss.span_weights=uniform" in one_sentence(err)) == (2, True)
    code, _, err = run(monkeypatch, capsys, "cache", recipe, "loss.method=sra", "compare.methods=[sra, uld]")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "train", recipe, "loss.method=sra", "-o", tmp_path / "run")
    assert (code, "set loss.span_weights=uniform" in one_sentence(err)) == (2, True)
    options = ("loss.method=sra", "loss.span_weights=uniform")
    code, _, err = run(monkeypatch, capsys, "train", recipe, *options, "-o", tmp_path / "run")
    assert code == 0, err
