"""Test runs with several teachers, each with its own tokenizer, cache and maps."""

import json

import pytest
import torch
import yaml

from dwakd import DistillConfig, DistillTrainer, UserError
from dwakd.recipe.recipe import load_recipe
from dwakd.training.teacher import CachedTeacher
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model, wordpiece
from tests.command_line import run as call
from tests.training.builders import ROWS, assert_same, on_policy, weights

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


KEY = {"teacher_key": "teacher", "teacher_names": ["a", "b"]}
NAMED = [{**row, "teacher": "ab"[n % 3 == 0]} for n, row in enumerate(ROWS)]  # b, a, a, b and so on


def trainer_of(output, folders, teachers=None, rows=ROWS, **options):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"template": "plain", "use_cpu": True, "seed": 3, "logging_steps": 1}
    args = DistillConfig(output_dir=str(output), **{**arguments, **options})
    held_out = [{**row, "teacher": rows[0]["teacher"]} for row in EVAL] if "teacher" in rows[0] else EVAL
    return DistillTrainer(folders[0], teachers or folders[1:], args, rows, held_out)


def gradients(run, examples):
    """Return the loss and the gradients of a step on some rows of the training set, and the batch that it read."""
    batch = run.data_collator([run.train_dataset[n] for n in examples])
    (micro,) = run._micro_batches([batch])
    run.model.zero_grad()
    output = run.model(batch.student, micro.sides, micro.scales, num_tokens=100.0)
    output["loss"].backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in run.model.named_parameters()}
    return output, found, micro


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


@pytest.mark.parametrize("method", ["dwa_kd", "dskd_v2", "min_ed", "alm", "sra"])
def test_rows_that_name_their_teacher_have_the_losses_of_the_split_rows(tmp_path, folders, method):
    """Loss and gradients are the sum of those of two runs, each with one teacher and its rows.

    Otherwise a row would also be distilled from a teacher that is bad at it, or its cross-entropy would count twice.
    """
    both = trainer_of(tmp_path / "both", folders, rows=NAMED, method=method, disable_dropout=True, **KEY)
    output, found, _ = gradients(both, range(6))
    total, expected, terms = (
        0.0,
        {n: torch.zeros_like(g) for n, g in found.items()},
        dict.fromkeys(output["terms"], 0.0),
    )
    for k, name in enumerate("ab"):
        own = [row for row in NAMED if row["teacher"] == name]
        one = trainer_of(tmp_path / name, folders, folders[1 + k], rows=own, method=method, disable_dropout=True)
        one.model.student.load_state_dict(both.model.student.state_dict())
        one.model.loss.load_state_dict(both.model.loss.losses[k].state_dict())
        assert one.train_dataset[0]["student"] == both.train_dataset[1 - k]["student"]
        part, gradient, _ = gradients(one, range(sum(row["teacher"] == name for row in NAMED[:6])))
        total += part["loss"].item()
        for term, value in part["terms"].items():
            terms[term] += value.item()
        for parameter, value in gradient.items():
            expected[parameter.replace("loss.", f"loss.losses.{k}.", 1)] += value
    assert output["loss"].item() == pytest.approx(total, rel=1e-5)
    assert_same(found, expected, atol=1e-5)
    shares = {f"gate_{k + 1}": output["terms"][f"gate_{k + 1}"].item() for k in range(2)}
    assert 0 < shares["gate_2"] < shares["gate_1"]
    assert {n: v.item() for n, v in output["terms"].items()} == pytest.approx({**terms, **shares}, rel=1e-5, abs=1e-6)


def test_a_teacher_runs_only_on_its_rows(tmp_path, folders):
    """A batch without a row of a teacher does not run it. Its maps have a gradient of 0, which DDP requires."""
    run = trainer_of(tmp_path, folders, rows=NAMED, **KEY)
    run.teachers[1].states = None  # calling it would raise an error
    output, found, micro = gradients(run, [1, 2])
    assert micro.sides[1] is None
    assert micro.scales[1].std.tolist() == [1, 1, 1]
    assert output["terms"]["gate_2"] == 0
    of_maps = [g for n, g in found.items() if n.startswith("loss.losses.1.")]
    assert of_maps
    assert not any(g.any() for g in of_maps)
    assert all(p.grad is not None for p in run.model.loss.parameters())


def test_rows_of_a_teacher_in_other_batches_and_from_caches(tmp_path, folders):
    """Accumulation and caches, which contain only the rows of their teachers, give the weights of one online batch."""
    online = trainer_of(tmp_path / "online", folders, rows=NAMED, **KEY)
    split = trainer_of(tmp_path / "split", folders, rows=NAMED, per_device_train_batch_size=1,
                       gradient_accumulation_steps=4, **KEY)  # fmt: skip
    caches = [CachedTeacher(tmp_path / f"cache-{k}", folder) for k, folder in enumerate(folders[1:])]
    cached = trainer_of(tmp_path / "cached", folders, caches, rows=NAMED, **KEY)
    for run in (online, split, cached):
        run.train()
    assert_same(weights(cached), weights(online))
    assert_same(weights(split), weights(online), atol=2e-4)
    assert [len(teacher.cache.index.places) for teacher in caches] == [10, 7]
    again = DistillTrainer(
        folders[0], caches, DistillConfig(output_dir=str(tmp_path / "again"), use_cpu=True, template="plain")
    )
    assert again.train_dataset is None, "caches can be read without rows, and without teacher_key"
    metrics = online.evaluate()
    assert (metrics["eval_gate_1"], metrics["eval_gate_2"]) == (0, 1)
    with pytest.raises(UserError, match=r"no row names the teacher .* in the column 'teacher'"):
        trainer_of(tmp_path / "none", folders, [CachedTeacher(tmp_path / f"none-{k}", f) for k, f in enumerate(folders[1:])],
                   rows=NAMED[:1], **KEY)  # fmt: skip


def test_answers_of_the_student_keep_the_teacher_of_their_row(tmp_path, folders):
    """On-policy, each teacher reads only the answers to its own prompts."""
    run = trainer_of(tmp_path, folders, rows=NAMED, method="alm", **on_policy(0.5), **KEY)
    batch = run.data_collator([run.train_dataset[n] for n in range(8)])
    (micro,) = run._micro_batches([batch], answer=run.student_answers)
    assert 0 < micro.batch.num_sampled < 8
    by_id = [NAMED[n]["teacher"] for n in micro.batch.example_ids]
    assert ["ab"[k] for k in micro.batch.chosen] == by_id
    run.train()
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_recipes_name_teachers_and_mistakes_are_named(tmp_path, folders, monkeypatch, capsys):
    """Each mistake with `teacher_key` is one sentence that names the row and the column. A correct recipe trains."""
    path, rows = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    recipe = {
        "student": {"model": folders[0]},
        "teacher": [{"name": "a", "model": folders[1], "cache": str(tmp_path / "cache")}, {"model": folders[2]}],
        "data": {"train": str(rows), "template": "plain", "teacher_key": "who"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
    }

    def train(names, *overrides):
        rows.write_text(
            "\n".join(json.dumps({**row, "who": name}) for row, name in zip(ROWS, names, strict=False)),
            encoding="utf-8",
        )
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        code, _, error = call(monkeypatch, capsys, "train", path, "-o", tmp_path / "run", *overrides)
        return code, error

    for names, message in (
        (["a", 2, "c"], "row 2 (counting from 0): the column 'who' must name one of the teachers a, 2, got 'c'"),
        (["a", None], "line 2: 'who' must be a string, got null"),
    ):
        code, error = train(names)
        assert (code, message in error) == (2, True), error
    for override, message in (
        ("data.teacher_key=whom", "has no column 'whom'"),
        ("teacher.1.weight=2", "teacher.weight is not used with data.teacher_key ('who')"),
        ('teacher.1.name="2"', "teacher.name must differ"),
        ("training.teacher_names=[a]", "use teacher.name"),
    ):
        code, error = train(["a", 2], override)
        assert (code, message in error) == (2, True), error
    code, error = train(["a", 2, "2", "a"])
    assert code == 0, error
    code, shown, _ = call(monkeypatch, capsys, "inspect", path, "--row", 3)
    assert (code, "row 3" in shown, "teachers is shown on its own rows" in " ".join(shown.split())) == (0, True, True)
    code, _, error = call(monkeypatch, capsys, "inspect", path, "--row", 1)
    assert (code, "has no such row of the first teacher; its rows are numbered 0 to 3" in error) == (2, True)
    recipe["teacher"] = recipe["teacher"][0]
    code, error = train(["a", 2])
    assert (code, "data.teacher_key names the column 'who', but there are not several teachers" in error) == (2, True)
    with pytest.raises(UserError, match="'teacher', but there are not several teachers"):
        trainer_of(tmp_path, folders, folders[1], rows=NAMED, teacher_key="teacher")
