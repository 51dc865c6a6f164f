"""Test training on a stream: which rows each batch has, what a resumed run reads, and what happens to unusable rows."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from dwakd import DistillConfig
from dwakd.data.rows import Example
from dwakd.data.sources import RowSource
from dwakd.data.stream import RowBatches
from dwakd.errors import UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.run import training_config
from tests.training.builders import ROWS, assert_same, trainer, weights

BROKEN = '{"prompt": "Why?", '
OPTIONS: dict[str, Any] = {"streaming": True, "max_steps": 6, "per_device_train_batch_size": 2, "method": "min_ed"}


def write(path: Path, *, broken: int | None = None) -> Path:
    lines = [json.dumps(row) for row in ROWS[:9]]
    if broken is not None:
        lines[broken] = BROKEN
    path.write_text("\n".join(lines) + "\n")
    return path


def batches(source: Any, size: int, rank: int, ranks: int, count: int, **options: Any) -> list[list[int]]:
    """Return the row numbers of the first batches of a rank; -1 for a row that cannot be used."""
    found = islice(RowBatches(RowSource(source, **options), size, rank, ranks), count)
    return [[slot.index if isinstance(slot, Example) else -1 for slot in batch] for batch in found]


def test_batches_of_each_rank(tmp_path: Path) -> None:
    """Ranks divide each batch of the whole, so that all of them together read the rows once and in order."""
    path = write(tmp_path / "rows.jsonl", broken=4)
    assert batches(path, 2, 0, 2, 4) == [[0, 1], [-1, 5], [8, 0], [3, -1]]
    assert batches(path, 2, 1, 2, 4) == [[2, 3], [6, 7], [1, 2], [5, 6]]
    assert batches(path, 4, 0, 1, 2) == [[0, 1, 2, 3], [-1, 5, 6, 7]]
    stream = datasets.Dataset.from_list(ROWS[:5]).to_iterable_dataset(num_shards=2)
    assert batches(stream, 2, 0, 1, 4, limit=4) == [[0, 1], [2, 3], [0, 1], [2, 3]]
    datasets.Dataset.from_list(ROWS[:3]).to_parquet(tmp_path / "rows.parquet")
    assert batches(tmp_path / "rows.parquet", 2, 0, 1, 2) == [[0, 1], [2, 0]]
    turns = [{"role": role, "content": role} for role in ("user", "assistant")] * 2
    assert batches([{"messages": turns}] * 2, 3, 0, 1, 2, supervise="all") == [[0, 1, 2], [3, 0, 1]]


def run_rows(folder: Path, path: Path, resume: str | None = None, **options: Any) -> tuple[Any, list[tuple[int, ...]]]:
    run = trainer(folder, rows=path, save_strategy="steps", save_steps=3, **{**OPTIONS, **options})
    seen: list[tuple[int, ...]] = []
    compute = run.compute_loss
    run.compute_loss = lambda model, inputs, *rest, **more: (
        seen.append(inputs.batch.example_ids) or compute(model, inputs, *rest, **more)
    )
    run.train(resume_from_checkpoint=resume)
    return run, seen


def test_a_resumed_run_continues_at_the_exact_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a checkpoint, the rows, their tokens and the weights are those of a run that was not interrupted."""
    path = write(tmp_path / "rows.jsonl", broken=5)
    options = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "invalid_rows": "skip"}
    whole, rows = run_rows(tmp_path / "whole", path, **options)
    assert rows == [(0, 1), (2, 3), (4,), (6, 7), (8, 0), (1, 2), (3, 4), (6,), (7, 8), (0, 1), (2, 3), (4,)]
    assert "line 6: not valid JSON" in caplog.text
    assert "skipped 3 rows (malformed: 3)" in caplog.text
    options["dataloader_num_workers"] = 0
    resumed, rest = run_rows(tmp_path / "resumed", path, str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert rest == rows[6:]
    assert_same(weights(resumed), weights(whole))


def test_a_corrupt_line_ends_a_run_with_one_sentence(tmp_path: Path) -> None:
    """The steps before the line are trained; then the message names the line, also from a worker process."""
    path = write(tmp_path / "rows.jsonl", broken=5)
    with pytest.raises(
        UserError,
        match=r"^[^\n]*rows.jsonl, line 6: not valid JSON [^\n]*: correct or remove that line, or set data.invalid_rows: skip$",
    ):
        run_rows(tmp_path / "run", path, dataloader_num_workers=1)
    with path.open("w") as file:
        file.writelines(f"{json.dumps({'prompt': 'Why? ' * 300, 'response': 'No.'})}\n" for _ in range(2))
    with pytest.raises(UserError, match=r"rows.jsonl, row 0 .*prompt has \d+ tokens for the student"):
        run_rows(tmp_path / "run", path)
    with pytest.raises(UserError, match=r"rows\.jsonl: no row can be used: correct the data"):
        run_rows(tmp_path / "run", path, invalid_rows="skip")


@pytest.mark.parametrize(
    ("broken", "method", "expected"), [(2, "dwa_kd", [0, 1, 1]), (0, "min_ed", [1, 1, 2])], ids=["last", "first"]
)
def test_a_step_without_a_usable_row_has_no_gradient(
    broken: int, method: str, expected: list[int], tmp_path: Path
) -> None:
    """A step whose only row is skipped has no response token, by whose number the loss is divided.

    Such a step may be the first one of a run, of a rank or after a resume, when there is no batch before it to repeat.
    """
    path = write(tmp_path / "rows.jsonl", broken=broken)
    options = {"per_device_train_batch_size": 1, "invalid_rows": "skip", "max_steps": 3, "method": method}
    run, rows = run_rows(tmp_path / "run", path, **options)
    assert rows == [(row,) for row in expected]
    gradients = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert [norm > 0 for norm in gradients] == [step != broken for step in range(3)]


def test_options_that_need_all_rows_are_refused(tmp_path: Path) -> None:
    """Options that cannot work without all rows are refused before anything runs."""
    given = {"output_dir": str(tmp_path), "use_cpu": True, "streaming": True, "max_steps": 2}
    for options, problem in (
        ({"max_steps": -1}, "data.streaming requires training.max_steps"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length needs all rows"),
        ({"teacher_cache": "x"}, "a teacher cache needs all rows"),
        ({"eval_strategy": "epoch"}, "training.eval_strategy: epoch has no effect with data.streaming"),
    ):
        with pytest.raises(UserError, match=problem):
            DistillConfig(**{**given, **options})
    base = {"student": {"model": "x"}, "loss": {"method": "sft"}}
    data = {"train": "rows.jsonl", "streaming": True}
    recipe = recipe_from_dict({**base, "data": data, "training": {"num_train_epochs": 2, "max_steps": 3}})
    with pytest.raises(UserError, match=r"training\.num_train_epochs needs all rows"):
        training_config(recipe, tmp_path)
    args = training_config(
        recipe_from_dict({**base, "data": data, "training": {"max_steps": 3, "use_cpu": True}}), tmp_path
    )
    assert (args.streaming, args.save_strategy) == (True, "steps")
    for rows, options, problem in (
        ([Example(0, "a", response="b")], {}, "these rows are in memory"),
        (tmp_path / "rows.jsonl", {"max_length": 64, "max_prompt_length": 64}, "max_prompt_length=64 must be"),
        (tmp_path / "rows.jsonl", {"invalid_rows": "ignore"}, "data.invalid_rows 'ignore' is unknown"),
        (tmp_path / "rows.csv", {}, "reads .jsonl and .parquet files, but not .csv"),
        (write(tmp_path / "rows.jsonl"), {"teacher_prompt_column": "prompt"}, "data.teacher_prompt needs all rows"),
    ):
        with pytest.raises(UserError, match=problem):
            trainer(tmp_path, rows=rows, **OPTIONS, **options)
