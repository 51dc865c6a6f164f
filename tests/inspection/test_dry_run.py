"""Test `dwakd train --dry-run`: it writes nothing, and its predictions are what the training then needs."""

import json

import pytest

from dwakd.inspection import prediction
from dwakd.recipe.recipe import load_recipe
from dwakd.training.distiller import Distiller
from dwakd.training.run import train
from dwakd.training.teacher import OnlineTeacher
from tests.command_line import make_workspace, one_sentence, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workspace with rows of different lengths, of which one occurs twice."""
    path = make_workspace(tmp_path_factory.mktemp("dry_run"))
    rows = [{"prompt": f"Say {n}.", "response": "It is number one. " * (n % 7)} for n in range(1, 38) if n % 7]
    for name, chosen in (("data", [*rows, rows[0]]), ("eval", rows[::5])):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return path


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    """Users try a recipe in the folder of their runs. The command must leave no folder of a run and no cache there."""
    monkeypatch.chdir(tmp_path)
    before = files(folder) | files(tmp_path)
    options = [f"teacher.cache={folder / 'cache'}", f"data.eval={folder / 'eval.jsonl'}", "--dry-run"]
    code, out, err = run(monkeypatch, capsys, "train", folder / "recipe.yaml", *options)
    assert code == 0, err
    assert files(folder) | files(tmp_path) == before
    for text in (
        "student 41,120 41,120",
        "teacher 27,712 0",
        "optimiser state",
        "A cache of the teacher will take",
    ):
        assert text in " ".join(out.split())
    assert [f"row {number} (counting from 0)" in out for number in range(4)] == [True, True, True, False]
    (tmp_path / "runs" / "recipe").mkdir(parents=True)
    (tmp_path / "runs" / "recipe" / "notes.txt").touch()
    code, _, err = run(monkeypatch, capsys, "train", folder / "recipe.yaml", "--dry-run")
    assert (code, "is not empty" in one_sentence(err)) == (2, True)


def test_prompts_that_the_student_answers(folder, tmp_path, monkeypatch, capsys):
    """With `training.lmbda: 1` the data may have no responses, so that no row can be shown."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(9)))
    options = [f"data.train={prompts}", "loss.method=alm", "training.lmbda=1", "training.max_new_tokens=4", "--dry-run"]
    code, out, err = run(monkeypatch, capsys, "train", folder / "recipe.yaml", *options)
    assert code == 0, err
    assert "optimiser state" in out
    assert "row 0" not in out


@pytest.mark.parametrize("cached", [False, True])
def test_predictions_against_a_training(folder, cached, monkeypatch, tmp_path):
    """On a clock that counts the tokens which the models read, the prediction is the time of the training.

    The numbers of steps and evaluations, the memory of weights and optimiser, and the size of the cache are those of the
    training.
    """
    clock = [0.0]

    def counted(method, price):
        def count(self, tokens, *args, **kwargs):
            clock[0] += price * sum(tokens.num_tokens)
            return method(self, tokens, *args, **kwargs)

        return count

    monkeypatch.setattr(Distiller, "forward", counted(Distiller.forward, 1.0))
    monkeypatch.setattr(OnlineTeacher, "states", counted(OnlineTeacher.states, 2.0))
    monkeypatch.setattr(prediction, "_now", lambda: clock[0])
    sizes = "per_device_train_batch_size=3", "gradient_accumulation_steps=2", "max_steps=-1", "num_train_epochs=2"
    options = [f"training.{item}" for item in (*sizes, "disable_tqdm=true")] + [f"data.eval={folder / 'eval.jsonl'}"]
    options += [f"teacher.cache={tmp_path / 'cache'}"] if cached else []
    recipe = load_recipe(folder / "recipe.yaml", options)
    found, longest = prediction.predict(recipe)
    clock[0] = 0.0
    trainer = train(recipe, tmp_path / "run")
    logs = trainer.state.log_history
    assert found.num_steps == trainer.state.global_step == 12
    assert found.num_evaluations == sum("eval_loss" in entry for entry in logs) == 2
    rows = trainer.train_dataset.rows
    assert [row.student.length for row in longest] == sorted(row.student.length for row in rows)[:-4:-1]
    theirs = [row.teacher for row in rows]
    different = {(side.num_prompt, *side.ids.tolist()): side.length for side in theirs}  # with the rows of the eval set
    (cache,) = found.caches
    assert cache.build_seconds == pytest.approx(2 * sum(different.values()))
    # reading a cache costs nothing on this clock
    assert found.seconds == pytest.approx(clock[0] + (cache.build_seconds if cached else 0), rel=0.03)
    assert found.teacher_seconds == pytest.approx(
        0 if cached else 2 * sum(side.length for side in theirs) / 6, rel=0.03
    )
    state = trainer.optimizer.state.values()
    assert found.memory["optimiser state"] == sum(one.nbytes for item in state for one in item.values())
    assert found.memory["weights: student"] == sum(one.nbytes for one in trainer.student.parameters())
    assert sum(found.memory.values()) == pytest.approx(found.peak_bytes, rel=0.05)
    if cached:
        stored = trainer.teachers[0].cache
        states = sum(stored.index.shard_lengths) * stored.token_bytes
        table, head = stored.teacher()
        assert cache.num_bytes == states + table.nbytes + (0 if head.weight is table else head.weight.nbytes)


@pytest.mark.parametrize(
    ("eval_steps", "delay", "expected"), [(4, 0, 3), (5, 0, 2), (0.5, 0, 2), (20, 0, 1), (4, 5, 2), (4, 11, 0)]
)
def test_the_evaluation_at_the_end_counts(eval_steps, delay, expected, folder, tmp_path):
    """With few steps, the evaluation after the last one may be the only one, and a large part of the time."""
    given = [f"data.eval={folder / 'eval.jsonl'}", "training.eval_strategy=steps", f"training.eval_steps={eval_steps}"]
    given.append(f"training.eval_delay={delay}")
    recipe = load_recipe(folder / "recipe.yaml", [*given, "training.max_steps=10", "loss.method=sft"])
    trained = train(recipe, tmp_path / "run")
    assert len([log for log in trained.state.log_history if "eval_loss" in log]) == expected
    assert prediction._num_evaluations(trained.args, 10, 10) == expected


@pytest.mark.parametrize(("size", "accumulation"), [(5, 1), (4, 2)])
def test_steps_without_the_last_rows_of_an_epoch(size, accumulation, folder, tmp_path):
    """`dataloader_drop_last` leaves out the rows that do not fill a batch."""
    options = [f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulation}"]
    options += ["dataloader_drop_last=true", "max_steps=-1", "num_train_epochs=2"]
    recipe = load_recipe(folder / "recipe.yaml", ["loss.method=sft", *(f"training.{option}" for option in options)])
    found, _ = prediction.predict(recipe)
    assert found.num_steps == train(recipe, tmp_path / "run").state.global_step
