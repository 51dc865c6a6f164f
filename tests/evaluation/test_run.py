"""Test that test sets and options are read and validated before the training and the answering."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from rich.table import Table

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte, text_encoder
from dwakd.evaluation.evaluate import evaluate_model, evaluation_signature
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.evaluation.report import evaluation_table
from dwakd.evaluation.run import (
    EvaluationSet,
    evaluate_plan,
    evaluate_sets,
    plan_evaluation,
    read_test_sets,
    results_folder,
    text_encoder_of,
    trained_folder,
)
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import recipe_from_dict
from tests.builders import CHAT_TEMPLATE, byte_bpe, tiny_model

SCORED = [{"prompt": "2 + 2 =", "response": "4"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("option", ["seeds", "max_new_tokens", "batch_size", "limit"])
def test_options_below_one_are_refused_by_name(option: str, tmp_path: Path) -> None:
    """Options below 1, such as zero tokens or rows, are refused with the name of the option."""
    test = write(tmp_path / "test.jsonl", [{"prompt": "2 + 2 =", "response": "4"}])
    section = {"test": [test], option: 0}
    content = {"student": {"model": "x"}, "data": {"train": test}, "loss": {"method": "sft"}, "evaluation": section}
    with pytest.raises(UserError, match=rf"^evaluation\.{option} .*got 0"):
        recipe_from_dict(content)


def test_the_sets_and_options_of_a_recipe_are_read(tmp_path: Path) -> None:
    """The test sets and options of a recipe are read, and a missing file is an error."""
    content: dict[str, Any] = {"student": {"model": "x"}, "loss": {"method": "sft"}}
    content["data"] = {"train": "unused", "prompt": "q", "response": "a"}
    test = write(tmp_path / "test.jsonl", [{"q": "2 + 2 =", "a": "4"}] * 3)
    section = {"test": [test], "limit": 2, "seeds": 3, "max_new_tokens": 7, "batch_size": 5, "temperatures": [1, 0.7]}
    plan = plan_evaluation(recipe_from_dict({**content, "evaluation": section}))
    assert [len(item.examples) for item in plan.sets] == [2]
    assert (plan.options.seeds, plan.options.max_new_tokens, plan.options.batch_size) == (3, 7, 5)
    assert plan.options.temperatures == [1.0, 0.7]
    published = plan_evaluation(recipe_from_dict({**content, "evaluation": {"test": [test], "decoding": "minillm"}}))
    assert published.options.decoding == "minillm"
    with pytest.raises(UserError, match=r"decoding minillm has temperature 1"):
        plan_evaluation(recipe_from_dict({**content, "evaluation": {**section, "decoding": "minillm"}}))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        plan_evaluation(recipe_from_dict({**content, "evaluation": {"test": ["nowhere.jsonl"]}}))


def read(paths: list[str]) -> list[EvaluationSet]:
    return read_test_sets(paths, RowOptions())


def test_names_are_unique_and_readable(tmp_path: Path) -> None:
    """Test sets with the same file name get different names, so that no answers are overwritten."""
    paths = [write(tmp_path / folder / "p3" / "test.jsonl", SCORED) for folder in ("a", "b")]
    paths += [write(tmp_path / "dolly" / "Test.jsonl", SCORED), write(tmp_path / "c" / "P3" / "test.jsonl", SCORED)]
    names = [item.name for item in read(paths)]
    assert names == ["p3-test", "p3-test-2", "dolly-Test", "P3-test-3"]
    with pytest.raises(UserError, match="named twice"):
        read([paths[0], paths[0]])


def test_long_names_are_cut(tmp_path: Path) -> None:
    """A file name above 255 bytes cannot be written, which would become known only after training and answering."""
    stems = ["語" * 70 + end for end in ("", "x", "xx")]
    names = [item.name for item in read([write(tmp_path / "p3" / f"{stem}.jsonl", SCORED) for stem in stems])]
    assert names[0] == f"p3-{stems[0]}", "213 bytes, and a file of this name may exist"
    assert len({*names}) == 3
    assert all(name.startswith("p3-語") for name in names)
    (tmp_path / f".{names[1]}.answers.jsonl.tmp-1234567").touch()
    long = [item.name for item in read([write(tmp_path / ("語" * 50) / f"{stem}.jsonl", SCORED) for stem in stems])]
    assert len({*long}) == 3
    assert max(len(name.encode()) for name in long) < 160


def test_splits_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set without a split `test` is evaluated on `validation`, never on its training rows."""
    splits = {name: datasets.Dataset.from_list(SCORED * n) for n, name in enumerate(("train", "validation", "test"), 1)}
    monkeypatch.setattr(
        "dwakd.data.sources.datasets.load_dataset", lambda *_, split: splits[split] if split else splits
    )
    assert len(read(["org/name"])[0].examples) == 3
    del splits["test"]
    assert len(read(["org/name"])[0].examples) == 2
    del splits["validation"]
    with pytest.raises(UserError, match=r"org/name has no split 'test'.* its splits are train; .*org/name@train"):
        read(["org/name"])
    assert len(read(["org/name@train"])[0].examples) == 1


def test_questions_without_answers_are_a_set_of_their_own(tmp_path: Path) -> None:
    """A set without any references is accepted; a set in which only some rows have references is an error."""
    questions = [{"instruction": "How?"}, {"instruction": "Why?"}]
    (item,) = read([write(tmp_path / "questions.jsonl", questions)])
    assert not item.scored
    assert len(item.examples) == 2
    mixed = write(tmp_path / "mixed.jsonl", [*SCORED, {"prompt": "3 + 3 =", "response": None}])
    with pytest.raises(UserError, match=r"mixed\.jsonl: 1 of 2 rows .*row 1 "):
        read([mixed])


def test_models_run_on_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, evaluating a student on all test sets takes days instead of minutes."""
    tokenizer = byte_bpe()
    for part in (tiny_model("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    seen = []

    def stop(model: Any) -> None:
        seen.append(model.device.type)
        raise UserError("stop")

    monkeypatch.setattr("dwakd.evaluation.run.check_head", stop)
    data = [write(tmp_path / "test.jsonl", SCORED)]
    for available in (False, True):
        monkeypatch.setattr("torch.accelerator.is_available", lambda found=available: found)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("meta"))
        with pytest.raises(UserError, match="stop"):
            evaluate_sets(str(tmp_path / "model"), data, RowOptions(template="plain"), EvalOptions())
    assert seen == ["cpu", "meta"]


def test_texts_have_their_own_bits_per_byte(tmp_path: Path) -> None:
    """Bits per byte of text must neither need prompts nor enter the mean of the references."""
    tokenizer = byte_bpe()
    model, encoder = tiny_model("llama", len(tokenizer)), TextEncoder(tokenizer, "plain")
    data = write(tmp_path / "test.jsonl", SCORED)
    text = write(tmp_path / "held-out.jsonl", [{"text": "Red, green and blue."}, {"text": "Hello."}])
    content = {"student": {"model": "x"}, "data": {"train": data}, "loss": {"method": "sft"}}
    section = {"test": [data], "text": [text], "seeds": 1, "max_new_tokens": 2}
    plan = plan_evaluation(recipe_from_dict({**content, "evaluation": section}))
    table = evaluate_plan(plan, model, encoder, tmp_path / "eval", name="x", overwrite=False).renderables[0]
    files = sorted(path.name for path in (tmp_path / "eval").iterdir())
    assert [name.removeprefix(tmp_path.name + "-") for name in files] == [
        "held-out.json",
        "test.answers.jsonl",
        "test.json",
    ]
    (numbers,) = (json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*held-out.json"))
    texts = [Example(0, "", response="Red, green and blue."), Example(1, "", response="Hello.")]
    expected = bits_per_byte(model, text_encoder(tokenizer), texts)
    assert numbers["bits_per_byte"] == json.loads(json.dumps(asdict(expected)))
    assert numbers["rouge_l"] is None
    assert set(numbers["signature"]) == {"metric", "model", "data", "tokenizer", "max_length", "dtype", "versions"}
    assert isinstance(table, Table)
    assert len(table.rows) == 2, "no mean of the two"
    assert "held-out: 2 rows; bits per byte without a prompt" in str(table.caption)
    with pytest.raises(UserError, match=r"test\.jsonl has no column 'text'"):
        read_test_sets([], RowOptions(), [data])


def test_other_results_are_kept_unless_they_may_be_replaced(tmp_path: Path) -> None:
    """Results with other options and the same file name are replaced only with --overwrite."""
    tokenizer = byte_bpe()
    for part in (tiny_model("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    model, data = str(tmp_path / "model"), [write(tmp_path / "dolly" / "test.jsonl", SCORED)]
    rows, short = RowOptions(template="plain"), EvalOptions(seeds=1, max_new_tokens=2)
    evaluate_sets(model, data, rows, short)
    evaluate_sets(model, data, rows, short)
    longer = EvalOptions(seeds=1, max_new_tokens=3)
    with pytest.raises(UserError, match=r"dolly-test\.json .*max_new_tokens 2 before, 3 now.*--overwrite"):
        evaluate_sets(model, data, rows, longer)
    evaluate_sets(model, data, rows, longer, overwrite=True)
    with pytest.raises(UserError, match=r"dolly-test\.json .*bos None before, never now"):
        evaluate_sets(model, data, RowOptions(template="plain", bos="never"), longer)
    file = tmp_path / "model" / "eval" / "dolly-test.json"
    assert json.loads(file.read_text(encoding="utf-8"))["signature"]["max_new_tokens"] == 3
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"dolly-test\.json"):
        evaluate_sets(model, data, rows, longer)


def test_templates_are_part_of_the_signature_and_of_no_markup(tmp_path: Path) -> None:
    """The caption shows a template such as Llama's [INST] as it is; another chat template or tokenizer has other results."""
    tokenizer = byte_bpe()
    model = tiny_model("llama", len(tokenizer))
    examples = [Example(0, "2 + 2 =", response="4")]
    plain = TextEncoder(tokenizer, "[INST] {instruction} [/INST]")
    found = evaluate_model(model, plain, examples, EvalOptions(seeds=1, max_new_tokens=2), progress=False)
    console = Console(width=200, file=io.StringIO())
    console.print(evaluation_table({"test": found}))
    assert "template [INST] {instruction} [/INST]" in " ".join(console.file.getvalue().split())
    made = []
    for template in (CHAT_TEMPLATE, f"Q: {CHAT_TEMPLATE}"):
        tokenizer.chat_template = template
        made.append(evaluation_signature(model, TextEncoder(tokenizer, "chat"), examples, EvalOptions()))
    tokenizer.add_tokens(["colour"])
    made.append(evaluation_signature(model, TextEncoder(tokenizer, "chat"), examples, EvalOptions()))
    assert made[0]["chat_template"] != made[1]["chat_template"] == made[2]["chat_template"]
    assert made[0]["tokenizer"] == made[1]["tokenizer"] != made[2]["tokenizer"]
    assert "chat_template" not in found.signature


def test_refused_rows_are_named_before_anything_is_evaluated(tmp_path: Path) -> None:
    """The message names the test set, and a tokenizer with more tokens than the model has embeddings is refused."""
    tokenizer = byte_bpe()
    refusal = "{% if messages[0].content == 'b' %}{{ raise_exception('no system prompt') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    for part in (tiny_model("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": name, "response": "4"}]) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"b\.jsonl, row 0 .*no system prompt"):
        evaluate_sets(str(tmp_path / "model"), paths, RowOptions(template="chat"), EvalOptions())
    assert not (tmp_path / "model" / "eval").exists()
    tokenizer.add_tokens(["colour"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="token ids up to 400, but the model has 400 embeddings"):
        evaluate_sets(str(tmp_path / "model"), paths, RowOptions(template="plain"), EvalOptions())


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quoted ~/run is the same model as its absolute path: with the template of its recipe, and its results beside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    byte_bpe().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "dwakd-recipe.yaml").write_text("data: {train: x, template: plain}")
    assert results_folder("~/run", None) == tmp_path / "run" / "eval"
    assert text_encoder_of("~/run", RowOptions(), recipe_of="~/run").template == "plain"
    assert trained_folder("base", "~/run") == "~/run"
    assert trained_folder("~/run", "an adapter without a recipe") == "~/run"


def test_the_date_of_the_recipe_is_printed(tmp_path: Path) -> None:
    """A model is evaluated with the prompts of its training, although its chat template prints the date."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    for part in (tiny_model("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path)
    data = {"train": "rows.jsonl", "template": "chat", "template_date": "2026-01-31"}
    recipe = recipe_from_dict({"student": {"model": "x"}, "loss": {"method": "sft"}, "data": data})
    (tmp_path / RECIPE_FILE).write_text(recipe.dump(), encoding="utf-8")
    rows, short = RowOptions(), EvalOptions(seeds=1, max_new_tokens=2)
    sets = [write(tmp_path / "test.jsonl", SCORED)]
    for folder, options, expected in (("a", {}, "31 Jan 2026"), ("b", {"template_date": "2025-02-03"}, "03 Feb 2025")):
        evaluate_sets(str(tmp_path), sets, rows, short, output=tmp_path / folder, **options)
        (answers,) = (tmp_path / folder).glob("*.jsonl")
        assert json.loads(answers.read_text(encoding="utf-8").splitlines()[0])["prompt"].startswith(expected)
