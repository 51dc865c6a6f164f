"""Test the model card of a student, and that it keeps what a user writes into it."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from dwakd import DistillConfig
from dwakd.evaluation.card import update_results
from dwakd.losses import METHODS
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.card import licence_of, recipe_of, write_card
from tests.command_line import run
from tests.training.builders import trainer

BASE = "HuggingFaceTB/SmolLM2-135M"


def recipe(**sections) -> dict:
    content = {"student": {"model": BASE}, "data": {"train": "org/rows@train[:90%]"}, "teacher": {"model": "Qwen/big"}}
    return recipe_from_dict({**content, "loss": {"method": "dwa_kd"}, **sections}).content()


@pytest.mark.parametrize("peft", [None, {"r": 4}])
def test_the_card_of_a_recipe(peft, tmp_path):
    """The card says what the student is made of and how to load it, with metadata that the hub reads."""
    write_card(recipe(student={"model": BASE, "peft": peft}), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.to_yaml()
    found = card.data.to_dict()
    assert found["base_model"] == BASE
    assert found["base_model_relation"] == ("finetune" if peft is None else "adapter")
    assert (found["library_name"], found["pipeline_tag"]) == (
        "transformers" if peft is None else "peft",
        "text-generation",
    )
    assert found["datasets"] == ["org/rows"]
    assert set(found["tags"]) == {"dwakd", "knowledge-distillation", "dwa_kd"}
    assert ("AutoPeftModelForCausalLM.from_pretrained" in card.text) == (peft is not None)
    assert "teacher `Qwen/big`" in card.text
    assert "arxiv.org/abs/2602.21669" in card.text
    (content,) = (part.split("```")[0] for part in card.text.split("```yaml\n")[1:])
    assert recipe_from_dict(yaml.safe_load(content)).teachers[0].model == "Qwen/big"


def test_what_else_the_student_was_trained_on(tmp_path):
    """The card names the teacher's answers and the share of the student's own answers."""
    answered = {"data": {"train": "x", "responses": "teacher"}, "generate": {"output": "y.jsonl"}}
    write_card(recipe(**answered), tmp_path / "a")
    assert "data `x` and the teacher's answers in `y.jsonl`" in (tmp_path / "a" / "README.md").read_text()
    write_card(recipe(training={"lmbda": 0.5}), tmp_path / "b")
    assert "training.lmbda 0.5" in (tmp_path / "b" / "README.md").read_text()
    endpoint = {"base_url": "http://intranet/v1", "model": "big"}
    write_card(recipe(teacher=None, loss={"method": "sft"}, generate={"endpoint": endpoint}), tmp_path / "c")
    served = [{"url": "http://intranet/v1", "model": "big"}]
    write_card(recipe(teacher=served, loss={"method": "alm"}), tmp_path / "d")
    for name in "cd":
        assert "intranet" not in (tmp_path / name / "README.md").read_text()


def test_the_card_of_a_sum_in_python(tmp_path):
    """A sum of methods, numbers of NumPy and a path that is gone must not cost the card of a finished training."""
    losses = [{"method": "alm", "chunk_temperature": np.float64(2.0)}, {"method": "dwa_kd"}]
    args = DistillConfig(method="sum", loss_options={"losses": losses}, learning_rate=np.float64(1e-4), use_cpu=True)
    write_card(recipe_of(args, BASE, ["/home/ann/gone/teacher"], "~ann/rows.jsonl", peft=False), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "teacher `teacher`, method `alm + dwa_kd`, data `rows.jsonl`" in text
    assert "ann" not in text


def test_licences_are_those_that_the_sources_declare(tmp_path, monkeypatch):
    """The licence of the student is that of its base model; one that nobody declares is left out."""
    for name, licence in (("student", "apache-2.0"), ("teacher", "llama3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# a model\n")
    models = {name: {"model": str(tmp_path / name)} for name in ("student", "teacher")}
    write_card(recipe(**models), tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "`student`: apache-2.0; `teacher`: llama3" in card.text
    assert str(tmp_path) not in str(card)
    assert "base_model" not in card.data.to_dict()
    assert licence_of(BASE) is None
    assert licence_of("org/rows", "dataset") is None


def result(sha: str = "a", mean: float = 20.0) -> dict:
    score = {"mean": mean, "std": 0.5, "n": 9, "interval": [mean - 1, mean + 1.5]}
    nothing = dict.fromkeys(("greedy_rouge_l", "exact_match", "greedy_exact_match"))
    bits = {"value": 1.25, "ece": 3.0}
    return {
        "rouge_l": score,
        "bits_per_byte": bits,
        **nothing,
        "num_examples": 9,
        "signature": {"model": {"sha256": sha}},
    }


def write_results(folder: Path, **results: dict) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    for name, one in results.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps(one))
    update_results(folder)


def test_results_of_another_tool_are_no_error(tmp_path):
    """A file with a signature may lack some of the metrics, and the evaluation before it must not fail."""
    write_card(recipe(), tmp_path)
    other = {name: value for name, value in result().items() if name != "greedy_exact_match"}
    write_results(tmp_path, test=other)
    assert "`test` | 9 | 20.00" in (tmp_path / "README.md").read_text()


def test_results_are_updated_and_the_users_text_is_kept(tmp_path):
    """An evaluation replaces its own numbers only. Text, tags, a licence and results from elsewhere are the user's."""
    write_card(recipe(), tmp_path)
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    card.data.license = "mit"
    card.data.tags.append("poetry")
    card.text = "My own words.\n" + card.text.replace("# " + tmp_path.name, "# A better title") + "\nThe end.\n"
    card.save(path)
    header = path.read_text().replace(
        "license: mit",
        "license: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: text-generation}\n"
        "    dataset: {name: GSM8K, type: gsm8k}\n    metrics: [{type: exact_match, value: 0.4}]",
    )
    path.write_text(header)
    write_results(tmp_path, one=result(), other=result("stale"), two=result())
    write_results(tmp_path, two=result(mean=30.0))
    (tmp_path / "eval" / "notes.json").write_text("[]")  # no evaluation of dwakd
    write_card(recipe(), tmp_path)  # as when the run is resumed
    card = ModelCard.load(path)
    assert card.text.lstrip().startswith("My own words.\n")
    assert "# A better title" in card.text
    assert card.text.rstrip().endswith("The end.")
    assert card.data.license == "mit"
    assert {"poetry", "dwakd"} <= set(card.data.tags)
    values = {(one.dataset_name, one.metric_name): one for one in card.data.eval_results}
    assert values["GSM8K", None].metric_value == 0.4
    assert values["two", "ROUGE-L, sampled"].metric_value == 30.0
    assert values["two", "ROUGE-L, sampled"].metric_args["interval"] == [29.0, 31.5]
    assert len(values) == len(card.data.eval_results) == 5  # none of other weights
    assert "| `two` | 9 | 30.00 (29.00–31.50) | 1.250 |" in card.text
    assert "| `one` | 9 | 20.00" in card.text
    assert card.text.count("## Results") == 1


def test_a_card_of_the_user_is_not_touched_by_an_evaluation(tmp_path, caplog):
    """A card that dwakd has not written, or whose metadata cannot be read, stays as it is."""
    path = tmp_path / "README.md"
    for text in ("# mine\n", "---\ntags: [a\n---\n<!-- dwakd: results -->\n"):
        path.write_text(text)
        write_results(tmp_path, one=result())
        assert path.read_text() == text
    assert "is not updated, because its metadata is invalid" in caplog.text


def test_every_method_of_a_paper_is_cited(tmp_path):
    """The citation comes from the first line of a method's module."""
    for method in set(METHODS) - {"sft", "kd", "gold"}:
        write_card(recipe(loss={"method": method}), tmp_path / method)
        assert f"`{method}`: https://arxiv.org/abs/" in (tmp_path / method / "README.md").read_text(), method


def test_training_and_evaluation_write_the_card(workspace, tmp_path, monkeypatch, capsys):
    """`dwakd train` with test sets and `dwakd eval` of the student add their results to the card."""
    data, output = workspace / "data.jsonl", tmp_path / "run"
    small = ["evaluation.limit=2", "evaluation.seeds=1", "evaluation.max_new_tokens=3", f"evaluation.test=[{data}]"]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *small, "-o", output)
    assert code == 0, err
    card = ModelCard.load(output / "README.md")
    (name,) = {one.dataset_name for one in card.data.eval_results}
    assert (output / "eval" / f"{name}.json").is_file()
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes())
    options = ["--limit", 2, "--seeds", 1, "--max-new-tokens", 3, "--data", other]
    code, _, err = run(monkeypatch, capsys, "eval", output, *options)
    assert code == 0, err
    card = ModelCard.load(output / "README.md")
    assert len({one.dataset_name for one in card.data.eval_results}) == 2
    assert str(tmp_path) not in str(card)


def test_the_card_in_python(tmp_path):
    """`save_model` writes the card of a trainer without a recipe, and no card of PEFT."""
    run = trainer(tmp_path, method="kd", lora=True, max_steps=1)
    run.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert "trained with dwakd: teacher `Gemma2ForCausalLM in memory`, method `kd`" in card.text
    assert "`LlamaForCausalLM in memory`" in card.text
    assert "base_model" not in card.data.to_dict()
    run.create_model_card(license="mit", tags="mine", finetuned_from="org/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "org/base")
    assert {"mine", "dwakd"} <= set(card.data.tags)
