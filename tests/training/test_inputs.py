"""Test every form of data that a trainer accepts for training and evaluation."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dwakd import DistillConfig, DistillTrainer
from dwakd.data.prompts import Prompts
from dwakd.errors import UserError
from dwakd.models.loading import on_device
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.inputs import check_tokenizer_type
from dwakd.training.run import recipe_examples
from tests.builders import tiny_model
from tests.training.builders import ROWS, assert_same, trainer, weights

OTHERS = ROWS[8:11]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def splits(kind: Callable[[dict[str, Any]], Any], table: Callable[[Any], Any] = datasets.Dataset.from_list) -> Any:
    return kind({"train": table(ROWS[:4]), "validation": table(OTHERS), "test": table(ROWS[:1])})


FORMS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "Dataset": lambda _: (datasets.Dataset.from_list(ROWS[:4]), datasets.Dataset.from_list(OTHERS)),
    "IterableDataset": lambda _: tuple(datasets.Dataset.from_list(x).to_iterable_dataset() for x in (ROWS[:4], OTHERS)),
    "DatasetDict": lambda _: (splits(datasets.DatasetDict),) * 2,
    "dict of Dataset": lambda _: (splits(dict),) * 2,
    "dict of list": lambda _: (splits(dict, list),) * 2,
    **{
        suffix: lambda folder, suffix=suffix: (
            str(write(folder / f"train.{suffix}", ROWS[:4])),
            write(folder / f"eval.{suffix}", OTHERS),
        )
        for suffix in ("json", "jsonl", "csv", "parquet")
    },
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], float]:
    """Return the result of a run on lists of rows."""
    return outcome(tmp_path_factory.mktemp("list"), ROWS[:4], OTHERS)


def outcome(folder: Path, rows: Any, eval_rows: Any) -> tuple[dict[str, torch.Tensor], float]:
    run = trainer(folder, rows=rows, eval_rows=eval_rows, method="sft", max_steps=1)
    run.train()
    return weights(run), run.evaluate()["eval_ce"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_and_evaluates_alike(
    tmp_path: Path, form: str, expected: tuple[dict[str, torch.Tensor], float]
) -> None:
    """Each form of the same data gives the same rows, from the same split and columns."""
    found = outcome(tmp_path, *FORMS[form](tmp_path))
    assert_same(found[0], expected[0])
    assert found[1] == expected[1]


def test_evaluation_sets_by_name(tmp_path: Path) -> None:
    """As in transformers, each set of a dict has its own metrics, and the best checkpoint is that of one set."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    options = {"method": "sft", "learning_rate": 0.05, "load_best_model_at_end": True, **often}
    options |= {"eval_rouge_l": True, "eval_max_new_tokens": 3, "metric_for_best_model": "bits_per_byte"}
    sets = {"news": OTHERS, "mail": datasets.Dataset.from_list(ROWS[11:13])}
    run = trainer(tmp_path / "first", eval_rows=sets, **options)
    assert (run.args.metric_for_best_model, run.args.greater_is_better) == ("news_bits_per_byte", False)
    run.train()
    logged = {name for entry in run.state.log_history for name in entry}
    wanted = {"ce", "loss", "bits_per_byte", "rouge_l"}
    assert logged >= {f"eval_{one}_{name}" for one in sets for name in wanted}
    assert "eval_loss" not in logged
    found = run.evaluate()
    best = min(entry["eval_news_ce"] for entry in run.state.log_history if "eval_news_ce" in entry)
    assert found["eval_news_ce"] == pytest.approx(best, rel=1e-5)
    assert found["eval_mail_ce"] == pytest.approx(run.evaluate(ROWS[11:13])["eval_ce"], rel=1e-6)
    assert run.evaluate({"x": OTHERS})["eval_x_ce"] == pytest.approx(best, rel=1e-5)
    named = trainer(tmp_path / "second", eval_rows=sets, **{**options, "metric_for_best_model": "eval_mail_rouge_l"})
    assert (named.args.metric_for_best_model, named.args.greater_is_better) == ("eval_mail_rouge_l", True)
    with pytest.raises(UserError, match="metric_for_best_model foo is unknown"):
        trainer(tmp_path, eval_rows=sets, **{**options, "metric_for_best_model": "mail_foo"})


def test_dicts_of_splits_are_one_data_set(tmp_path: Path) -> None:
    """A dict with a split train is one data set, and an empty dict is refused."""
    with pytest.raises(UserError, match="eval_dataset is an empty dict"):
        trainer(tmp_path, method="sft", eval_rows={})
    with pytest.raises(UserError, match=r"the eval dataset news, row 0 .*'response'"):
        trainer(tmp_path, method="sft", eval_rows={"news": [{"prompt": "Why?", "response": None}]})
    with pytest.raises(UserError, match=r"the train dataset has no split 'train': its splits are test"):
        trainer(tmp_path, method="sft", rows=datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)))
    run = trainer(tmp_path, method="sft")
    assert run.evaluate({"train": ROWS, "test": OTHERS}) == run.evaluate(OTHERS)


def test_models_by_name_are_loaded_as_model_init_kwargs_say(workspace: Path, tmp_path: Path) -> None:
    """TRL's model_init_kwargs say how models are loaded; with a loaded model they would have no effect.

    A teacher with a device map uses all GPUs of a process, which would otherwise be an error.
    """
    arguments: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "template": "plain", "method": "sft"}
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "auto"}
    kwargs = {"teacher_model_init_kwargs": options, "model_init_kwargs": {"torch_dtype": torch.float16}}
    models = str(workspace / "student"), str(workspace / "teacher")
    args = DistillConfig(**{**arguments, "method": "dwa_kd"}, **kwargs)
    args._n_gpu = 2
    run = DistillTrainer(*models, args)
    teacher = run.teachers[0].model
    assert (run.student.dtype, teacher.dtype) == (torch.float16, torch.bfloat16)
    assert teacher.config._attn_implementation == "eager"
    teacher.hf_device_map = {"": "cpu"}  # transformers sets it for GPUs only
    assert on_device(teacher, torch.device("meta")).device.type == "cpu"
    args._n_gpu, args.teacher_model_init_kwargs = 2, None
    with pytest.raises(UserError, match="2 GPUs are visible to one process"):
        DistillTrainer(*models, args)
    with pytest.raises(UserError, match="model_init_kwargs requires a model given by name"):
        trainer(tmp_path, method="sft", model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(UserError, match="teacher_model_init_kwargs requires a teacher_model given by name"):
        trainer(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"^model_init_kwargs\.dtype must be 'float32'.* got 'auto'"):
        DistillConfig(**arguments, model_init_kwargs={"dtype": "auto"})


def test_rows_without_a_response_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`invalid_rows: skip` also skips rows that the reader refuses, in a trainer and in a recipe."""
    rows = [*ROWS[:3], {"prompt": "Why?", "response": None}]
    with caplog.at_level(logging.WARNING, "dwakd"):
        run = trainer(tmp_path, rows=rows, eval_rows=rows[1:], method="sft", invalid_rows="skip")
    assert [len(run.train_dataset), len(run.eval_dataset)] == [3, 2]
    assert "1 of 4 rows" in caplog.text
    with pytest.raises(UserError, match=r"the train dataset, row 3 .*'response' .*null"):
        trainer(tmp_path, rows=rows, method="sft")
    path = str(write(tmp_path / "rows.jsonl", rows))
    data = {"train": path, "eval": path, "invalid_rows": "skip"}
    recipe = recipe_from_dict({"student": {"model": "x"}, "data": data, "loss": {"method": "sft"}})
    train, evaluation = recipe_examples(recipe)
    assert [len(list(train)), len(evaluation or [])] == [3, 3]


def test_a_recipe_reads_every_turn(tmp_path: Path) -> None:
    """`data.supervise` of a recipe holds for the rows to train on and for those to evaluate on."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant")] * 2
    path = str(write(tmp_path / "rows.jsonl", [{"messages": turns}]))
    data = {"train": path, "eval": path, "supervise": "all"}
    recipe = recipe_from_dict({"student": {"model": "x"}, "data": data, "loss": {"method": "sft"}})
    assert [[len(one.turns) for one in rows or []] for rows in recipe_examples(recipe)] == [[1, 3], [1, 3]]


def test_rows_that_cannot_be_shown_are_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is skipped because the template refuses it is not answered for ROUGE-L."""
    render = Prompts.render

    def refuse(prompts: Prompts, example: Any) -> str:
        if example.instruction == OTHERS[1]["prompt"]:
            raise UserError("the template refuses this row")
        return render(prompts, example)

    monkeypatch.setattr(Prompts, "render", refuse)
    options = {"method": "sft", "invalid_rows": "skip", "eval_rouge_l": True, "eval_max_new_tokens": 2}
    run = trainer(tmp_path, rows=ROWS[:4], eval_rows=OTHERS, **options)
    assert "eval_rouge_l" in run.evaluate()


def test_one_warning_of_cut_responses_for_each_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Truncated responses are reported once for each data set, not once for each model."""
    long = [{"prompt": "Go on.", "response": "The quick brown fox jumps. " * 40}]
    with caplog.at_level(logging.WARNING, "dwakd"):
        trainer(tmp_path, rows=[*long, *ROWS[:1]], eval_rows=long, max_length=100, max_prompt_length=50)
    said = [record.getMessage() for record in caplog.records if "data.max_length=100" in record.getMessage()]
    assert [line.split(" responses")[0] for line in said] == [
        "the train dataset: 1 of 2",
        "the eval dataset: 1 of 1",
    ]


def test_every_turn_trains_as_a_row_of_its_own(tmp_path: Path) -> None:
    """With `supervise: all`, a conversation trains and evaluates exactly as the rows that repeat its context."""
    rows, unrolled = [], []
    for first, second in zip(ROWS[:8:2], ROWS[1:8:2], strict=True):
        turns = []
        for row in (first, second):
            turns.append({"role": "user", "content": row["prompt"]})
            unrolled.append({"prompt": [*turns], "completion": [{"role": "assistant", "content": row["response"]}]})
            turns += unrolled[-1]["completion"]
        rows.append({"messages": turns})
    options: dict[str, Any] = {"max_steps": 2, "lmbda": 0.5, "max_new_tokens": 4, "method": "alm"}
    runs = [
        trainer(
            tmp_path / name, rows=data, eval_rows=data[:2] if name == "all" else data[:4], supervise=name, **options
        )
        for name, data in (("all", rows), ("last", unrolled))
    ]
    for run in runs:
        run.train()
    assert_same(weights(runs[0]), weights(runs[1]))
    assert runs[0].evaluate()["eval_ce"] == runs[1].evaluate()["eval_ce"]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_prompt_of_the_teacher_changes_only_the_teacher(tmp_path: Path, lmbda: float) -> None:
    """The student's cross-entropy is that of a run without private prompts, and the teacher's part of the loss is not."""
    found = {}
    for name, hint in (("own", None), ("same", "{}"), ("hint", "Speak like a pirate. " * 9 + "{}")):
        rows = [row | {"hint": hint and hint.format(row["prompt"])} for row in ROWS[:4]]
        column = {"teacher_prompt_column": "hint"} if hint else {}
        options = {"lmbda": lmbda, "max_new_tokens": 9, "max_length": 64, "max_prompt_length": 48}
        run = trainer(tmp_path / name, rows=rows, eval_rows=rows, method="alm", max_steps=1, **options, **column)
        run.train()
        found[name] = run.evaluate()
    terms = [
        name for name in found["own"] if name.startswith("eval_") and name not in ("eval_ce", "eval_bits_per_byte")
    ]
    assert found["own"]["eval_loss"] == found["same"]["eval_loss"] != found["hint"]["eval_loss"]
    assert any(found["own"][name] != found["hint"][name] for name in terms)


def test_a_teacher_without_room_for_its_prompt_is_refused(tmp_path: Path) -> None:
    """A private prompt is not cut, so one that the teacher cannot read is refused before training, with its row."""
    rows = [ROWS[0] | {"hint": None}, ROWS[1] | {"hint": "Look here. " * 200}]
    with pytest.raises(UserError, match=r"row 1 \(counting from 0\): prompt and response have up to .* 512 positions"):
        trainer(tmp_path, rows=rows, method="alm", teacher_prompt_column="hint")


def test_an_argument_that_is_no_tokenizer_is_refused():
    """Users of other trainers pass a name or a processor. The types of the trainer are not checked at run time."""
    with pytest.raises(UserError, match=r"^processing_class must be a tokenizer, got 'gpt2'; pass AutoTokenizer"):
        check_tokenizer_type("gpt2", "processing_class")
    with pytest.raises(UserError, match="teacher_processing_class must be a tokenizer, got a GPT2LMHeadModel"):
        check_tokenizer_type(tiny_model("gpt2"), "teacher_processing_class")
