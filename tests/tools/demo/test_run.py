"""Test the demo from the corpus to the table."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd.compare.plan import variants_of
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from dwakd.recipe.recipe import load_recipe
from dwakd.tools.demo import run
from dwakd.tools.demo.run import QUICK, ROWS, TEMPLATE, DemoSizes, conclusions, demo_recipe, run_demo


def test_data_models_and_comparison_are_written(tmp_path, monkeypatch):
    """The demo writes data, models and a recipe, with which its comparison can be continued."""
    monkeypatch.setattr(run, "ROWS", {name: ROWS[name] for name in ("sft", "seqkd + dwa_kd + alm")})
    folder = tmp_path / "demo"
    printed = run_demo(folder, seed=1, quick=True).renderables
    assert [text for text in printed if isinstance(text, str) and "do not compare" in text]
    rows = json.loads((folder / "comparison" / "comparison.json").read_text())["variants"]
    assert list(rows) == ["teacher", "sft", "seqkd + dwa_kd + alm"]
    assert all(row["bits_per_byte"] > 0 for row in rows.values())
    for name in ("teacher", "student"):
        model, tokenizer = (kind.from_pretrained(folder / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert model.config.vocab_size == len(tokenizer)
    labelled, test = (load_examples(folder / f"{name}.jsonl") for name in ("labelled", "test"))
    assert (len(labelled), len(test)) == (QUICK.num_labelled, QUICK.num_test)
    assert all(row.response == row.references[0] for row in test)
    assert any(len(row.references) > 1 for row in test)
    answers = load_examples(folder / "answers.jsonl")
    assert 0 < len(answers) <= QUICK.num_prompts - QUICK.num_labelled
    assert not {row.instruction for row in answers} & {row.instruction for row in (*labelled, *test)}
    assert load_recipe(folder / "recipe.yaml", [], "compare").data.template == TEMPLATE
    with pytest.raises(UserError, match="is not empty"):
        run_demo(folder, seed=1, quick=True)


def test_every_row_is_a_valid_recipe(tmp_path):
    """The rows that the test above leaves out are valid, too, and those with more text take more steps."""
    content = demo_recipe(tmp_path, DemoSizes(), 3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = load_recipe(tmp_path / "recipe.yaml", [], "compare")
    variants = {one.name: one.recipe(recipe) for one in variants_of(recipe, recipe.compare, ablation=False)}
    assert list(variants) == list(ROWS)
    assert variants["sft"].training["max_steps"] * 2 == variants["seqkd"].training["max_steps"]
    assert variants["dwa_kd"].loss_options == {"variant": "recommended"}


def test_conclusions_are_computed_from_the_numbers():
    """Sentences name the difference and its interval, and the best row on the teacher's answers."""
    gap = {"greedy_rouge_l": (2.0, 0.5, 3.5), "bits_per_byte": (-0.02, -0.03, 0.01)}
    other = {"greedy_rouge_l": (1.0, 0.0, 2.0), "bits_per_byte": (-0.1, -0.2, -0.05)}
    rows = {
        "teacher": {"versus": {}, "bits_per_byte": 0.1},
        "sft": {"versus": {"dwa_kd": gap}, "bits_per_byte": 0.5},
        "dwa_kd": {"versus": {"sft": gap}, "bits_per_byte": 0.4},
        "seqkd": {"versus": {"sft": gap}, "bits_per_byte": 0.3},
        "seqkd + alm": {"versus": {"seqkd": gap}, "bits_per_byte": 0.28},
        "seqkd + dwa_kd": {"versus": {"seqkd": other}, "bits_per_byte": 0.2},
        "dskd": {"failed": "no luck"},
    }
    first, second, _ = conclusions(rows)
    assert "+2.0 greedy ROUGE-L [+0.5, +3.5] and -0.020 bits per byte [-0.030, +0.010]" in first
    assert "seqkd + dwa_kd" in second
    assert "-0.100 bits per byte" in second
    assert len(conclusions({"sft": {"failed": "no luck"}})) == 1


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_seeds_out_of_range(tmp_path, seed):
    """A seed out of range is refused before anything is trained."""
    with pytest.raises(UserError, match="--seed"):
        run_demo(tmp_path / "demo", seed=seed, quick=True)
