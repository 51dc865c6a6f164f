"""Test runs with several teachers, each with its own tokenizer, cache and maps."""

import json

import pytest
import yaml

from dwakd import DistillConfig, DistillTrainer, UserError
from dwakd.recipe.recipe import load_recipe
from dwakd.training.teacher import CachedTeacher
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model, wordpiece
from tests.command_line import run as call
from tests.training.builders import ROWS, assert_same, weights

TOKENIZERS = byte_bpe(), bpe_byte_fallback(), wordpiece(vocab_size=200)
EVAL = [{"prompt": "Name one.", "response": "A red door."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a student and two teachers, each saved with its tokenizer."""
    root, saved = tmp_path_factory.mktemp("models"), []
    for seed, (family, tokenizer) in enumerate(zip(("llama", "gemma2", "gpt2"), TOKENIZERS, strict=True)):
        folder = root / f"{family}-{seed}"
        tokenizer.eos_token = tokenizer.eos_token or "[SEP]"
        tiny_model(family, len(tokenizer), seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved.append(str(folder))
    return saved


def trainer_of(output, folders, teachers=None, **options):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"template": "plain", "use_cpu": True, "seed": 3, "logging_steps": 1}
    args = DistillConfig(output_dir=str(output), **{**arguments, **options})
    return DistillTrainer(folders[0], teachers or folders[1:], args, ROWS, EVAL)


@pytest.mark.parametrize("method", ["dwa_kd", "dskd_v2", "min_ed", "alm", "sra"])
def test_accumulation_changes_nothing(tmp_path, folders, method):
    """Gradient accumulation gives the same weights as one large batch, with two teachers."""
    whole = trainer_of(tmp_path / "whole", folders, method=method)
    split = trainer_of(
        tmp_path / "split", folders, method=method, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for run in (whole, split):
        run.train()
    assert_same(weights(split), weights(whole), atol=2e-4)
    metrics = whole.evaluate()
    assert metrics["eval_bits_per_byte"] > 0
    gated = method in ("dwa_kd", "dskd_v2")
    assert ("eval_gate_2" in metrics) == gated
    if gated:
        assert metrics["eval_gate_1"] + metrics["eval_gate_2"] == pytest.approx(1, abs=1e-5)


def test_caches_of_several_teachers_change_nothing_and_a_run_resumes(tmp_path, folders):
    """Cached and online teachers give the same weights to the last bit, also in a resumed run."""
    online = trainer_of(tmp_path / "online", folders)
    caches = [tmp_path / f"cache-{k}" for k in range(2)]
    options = {"save_strategy": "steps", "save_steps": 2}
    cached = trainer_of(
        tmp_path / "run", folders, [CachedTeacher(c, f) for c, f in zip(caches, folders[1:], strict=True)], **options
    )
    for run in (online, cached):
        run.train()
    assert_same(weights(cached), weights(online))
    resumed = trainer_of(
        tmp_path / "run", folders, [CachedTeacher(c, f) for c, f in zip(caches, folders[1:], strict=True)], **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(weights(resumed), weights(online))


def test_a_recipe_names_several(tmp_path, folders, monkeypatch, capsys):
    """The section teacher may be a list. Each teacher has its own weight and cache."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    recipe = {
        "student": {"model": folders[0]},
        "teacher": [
            {"model": folders[1], "weight": 3, "cache": str(tmp_path / "first")},
            {"model": folders[2], "cache": str(tmp_path / "second")},
        ],
        "data": {"train": str(rows), "template": "plain"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert [teacher.weight for teacher in loaded.teachers] == [3, 1]
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(loaded.dump(), encoding="utf-8")
    assert load_recipe(dumped) == loaded
    for arguments in (["cache", path], ["train", path, "-o", tmp_path / "run"]):
        assert call(monkeypatch, capsys, *arguments)[0] == 0
    record = json.loads((tmp_path / "run" / "dwakd-run.json").read_text(encoding="utf-8"))
    assert record["teacher_caches"] == [str(tmp_path / "first"), str(tmp_path / "second")]
    code, _, error = call(monkeypatch, capsys, "train", path, "teacher.model=x", "-o", tmp_path / "other")
    assert (code, "teacher is a list here" in error) == (2, True)
    code, _, error = call(monkeypatch, capsys, "cache", path, "-o", tmp_path / "one")
    assert (code, "set cache for each teacher in the recipe" in error) == (2, True)


def test_teachers_with_and_without_a_cache(tmp_path, folders, monkeypatch, capsys):
    """One teacher may run online while another one is cached. `dwakd cache` builds only the latter."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    recipe = {
        "student": {"model": folders[0]},
        "teacher": [{"model": folders[1]}, {"model": folders[2], "cache": str(tmp_path / "second")}],
        "data": {"train": str(rows), "template": "plain"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for arguments in (["cache", path], ["cache", path, "--check"]):
        code, out, error = call(monkeypatch, capsys, *arguments)
        assert code == 0, error
        assert out.count("teacher cache") == 1
        assert str(tmp_path / "second") in out
    assert call(monkeypatch, capsys, "train", path, "-o", tmp_path / "run")[0] == 0
    del recipe["teacher"][1]["cache"]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, _, error = call(monkeypatch, capsys, "cache", path)
    assert (code, "teacher.cache is missing" in error) == (2, True)
    recipe["teacher"][1]["share"] = 1
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, _, error = call(monkeypatch, capsys, "train", path)
    assert (code, "unknown option teacher.2.share" in error) == (2, True), "counted as everywhere, from 1"


def test_mistakes_with_several_teachers_are_named(tmp_path, folders):
    """Mistakes are reported before the models are loaded, where possible."""
    with pytest.raises(UserError, match="teacher_weights must be a list of 2"):
        trainer_of(tmp_path, folders, teacher_weights=[1.0])
    with pytest.raises(UserError, match="teacher_cache is for one teacher"):
        trainer_of(tmp_path, folders, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="teacher_processing_class must be a list of 2"):
        DistillTrainer(folders[0], folders[1:], DistillConfig(output_dir=str(tmp_path)), ROWS,
                       teacher_processing_class=TOKENIZERS[1])  # fmt: skip


def test_one_teacher_in_a_list_is_one_teacher(tmp_path, folders):
    """A list with one teacher gives the same run as the teacher itself."""
    one, listed = (
        trainer_of(tmp_path / "one", folders, folders[1]),
        trainer_of(tmp_path / "list", folders, [folders[1]]),
    )
    for run in (one, listed):
        run.train()
    assert_same(weights(listed), weights(one))
