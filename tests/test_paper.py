"""The comparison with the published tables: noise, and the protocol."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.paper import (
    NUM_ROWS,
    SEEDS,
    TABLES,
    compare_with_paper,
    comparison_scores,
    difference,
    main,
    published_set,
    t_quantile,
)

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.evaluation.run import EvaluationPlan, EvaluationSet, evaluate_plan
from dwakd.recipe.files import parse_yaml
from tests.builders import byte_bpe, tiny_model

RECIPES = Path(__file__).parents[1] / "recipes" / "paper"
FILES = {
    "dolly": "MiniLLM/dolly:valid.jsonl",
    "self-instruct": "MiniLLM/self-inst:valid.jsonl",
    "vicuna": "MiniLLM/Vicuna:valid.jsonl",
    "s-ni": "MiniLLM/sinst:11_/valid.jsonl",
}
PAIR = "qwen1.5-1.8b-gpt2-120m"


def evaluation(name: str, mean: float, std: float | None = 0.5, **signature: Any) -> dict[str, Any]:
    """The JSON of an evaluation by the published protocol."""
    made = {
        "model": {"name": "MiniLLM/MiniLLM-gpt2-120M"},
        "data": {"name": FILES[name], "rows": NUM_ROWS[name]},
        "template": "alpaca",
        "seeds": SEEDS,
        "temperature": 1.0,
        "top_p": 1.0,
        "no_repeat_ngram_size": 6,
        "max_new_tokens": 256,
    }
    return {"rouge_l": {"mean": mean, "std": std}, "signature": {**made, **signature}}


def write(folder: Path, evaluations: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in evaluations.items():
        (folder / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")
    return folder


def comparison(stds: dict[str, float | None], seeds: int) -> dict[str, Any]:
    """A comparison.json with these spreads over training seeds."""
    sets = dict.fromkeys(
        ("MiniLLM-dolly-valid", "MiniLLM-self-inst-valid", "MiniLLM-Vicuna-valid", "sinst-11_-valid"), 17.0
    )
    row: dict[str, Any] = {"training_seeds": seeds, "rouge_l": 17.0, "sets": sets}
    return {"variants": {name: {**row, "std_over_training_seeds": {"rouge_l": std}} for name, std in stds.items()}}


def test_noise_of_an_evaluation(tmp_path: Path) -> None:
    """A published mean of five seeds is as noisy as ours; a noise that is too small would report false differences."""
    noise = 2.776 * 0.5 * math.sqrt(2 / 5) + 0.05  # t with 4 degrees of freedom, and rounding to 0.1
    scores = {"dolly": 24.6 + noise + 0.02, "self-instruct": 13.2 - noise + 0.02, "vicuna": 16.9, "s-ni": 25.3}
    made = {name: evaluation(name, mean) for name, mean in scores.items()}
    found, faults = compare_with_paper(write(tmp_path, made))
    assert faults == []
    assert {one.test_set: one.verdict for one in found} == {
        "dolly": "differs",
        "self-instruct": "within the noise",
        "vicuna": "within the noise",
        "s-ni": "within the noise",
    }
    assert found[0].noise == pytest.approx(noise, rel=0.01)


def test_mean_of_the_sets(tmp_path: Path) -> None:
    """One training run has an unknown noise, whatever its generation seeds; without all four sets there is no mean."""
    made = {name: evaluation(name, mean) for name, mean in zip(FILES, (20.0, 10.0, 15.0, 25.6), strict=True)}
    (one,), _ = compare_with_paper(write(tmp_path / "all", made), PAIR, "dwa_kd")
    assert (one.test_set, one.published) == ("mean", 17.68)
    assert one.ours == pytest.approx(17.65)
    assert (one.noise, one.verdict) == (None, "noise unknown")
    del made["vicuna"]
    with pytest.raises(UserError, match="evaluate all of dolly"):
        compare_with_paper(write(tmp_path / "three", made), PAIR, "dwa_kd")


def test_noise_of_trained_models() -> None:
    """The spread of two seeds of one method says nothing; pooled over the methods it does."""
    scores = comparison_scores(comparison({"sft": 0.3, "dwa_kd": 0.4, "teacher": None}, seeds=3))
    pooled = math.sqrt((2 * 0.3**2 + 2 * 0.4**2) / 4)
    assert scores["sft"]["mean"].error == pytest.approx(pooled * math.sqrt(4 / 3))
    assert scores["sft"]["mean"].freedom == 4
    assert scores["dwa_kd"]["mean"].error == scores["sft"]["mean"].error
    one_seed = comparison_scores(comparison({"sft": None}, seeds=1))
    assert difference("sft", "mean", 13.85, one_seed["sft"]["mean"]).verdict == "noise unknown"


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (18, 2.101)])
def test_t_quantiles(freedom: int, expected: float) -> None:
    """Values from a table of Student's t distribution."""
    assert t_quantile(freedom) == pytest.approx(expected, rel=0.01)


def test_a_comparison_is_read_with_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of other sets or of another decoding is not comparable, and the reader must learn it."""
    (tmp_path / "comparison.json").write_text(json.dumps(comparison({"sft": 0.3, "alm": 0.2, "gold": 0.1}, seeds=2)))
    found, faults = compare_with_paper(tmp_path)
    assert [(one.row, one.published) for one in found] == [("sft", 13.85), ("alm", 16.01)], "gold was not published"
    assert "unknown" in faults[0]
    cell = write(tmp_path / "cells" / "sft-1" / "eval", {"d": evaluation("dolly", 1.0, no_repeat_ngram_size=None)})
    assert compare_with_paper(tmp_path)[1] == ["dolly: no_repeat_ngram_size is None, but 6 in the published tables"]
    short = evaluation("vicuna", 1.0, data={"name": FILES["vicuna"], "rows": 20}, seeds=[10])
    text = {"rouge_l": None, "signature": {"data": {"name": "dolly-text.jsonl"}, "metric": "bits per byte"}}
    write(cell, {"d": evaluation("dolly", 1.0), "v": short, "t": text})
    assert [fault.split(" is ")[0] for fault in compare_with_paper(tmp_path)[1]] == ["vicuna: seeds", "vicuna: rows"]
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "differs" in shown
    assert "Not the published protocol" in shown


def test_names_of_the_sets() -> None:
    """The names that `dwakd eval` gives the files of recipes/paper, and those of local copies."""
    assert [published_set(name) for name in FILES.values()] == list(FILES)
    names = ("MiniLLM-dolly-valid", "MiniLLM-self-inst-valid", "MiniLLM-Vicuna-valid", "sinst-11_-valid")
    assert [published_set(name) for name in names] == list(FILES)
    assert [published_set(name) for name in ("self_instruct/test.jsonl", "uinst-valid", "p3-test")] == [
        "self-instruct",
        None,
        None,
    ]


def test_recipes_and_tables_belong_together() -> None:
    """Every pair of the paper has a recipe with the published protocol and a method for every row."""
    assert {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("teacher")} == set(TABLES) - {
        "minillm"
    }
    for pair in set(TABLES) - {"minillm"}:
        recipe = parse_yaml((RECIPES / f"{pair}.yaml").read_text(encoding="utf-8"))
        assert recipe["evaluation"]["test"] == list(FILES.values())
        assert recipe["evaluation"]["decoding"] == "minillm"
        assert set(TABLES[pair]) - {"teacher"} <= set(recipe["compare"]["methods"])


def test_results_of_this_version_are_read(tmp_path: Path) -> None:
    """The JSON that `dwakd eval` writes has the fields that are read here."""
    model, encoder = tiny_model("gpt2", 420), TextEncoder(byte_bpe(), "alpaca")
    examples = [Example(0, "Hi", response="Hello"), Example(1, "Name a colour.", response="Red")]
    sets = [EvaluationSet(name, source, examples) for name, source in FILES.items()]
    options = EvalOptions(decoding="minillm", seeds=2, max_new_tokens=4, greedy=False)
    plan = EvaluationPlan(sets, options, RowOptions())
    evaluate_plan(plan, model, encoder, tmp_path / "eval", name="MiniLLM/MiniLLM-gpt2-120M", overwrite=False)
    found, faults = compare_with_paper(tmp_path)
    assert [one.test_set for one in found] == list(FILES)
    assert {fault.split(": ")[1].split(" is ")[0] for fault in faults} == {"seeds", "max_new_tokens", "rows"}


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    """Wrong folders and rows: one sentence with the choice."""
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "nowhere", {}, "does not exist"),
        (write(tmp_path / "empty", {}), {}, "contains no results"),
        (write(tmp_path / "other", {"x": {"a": 1}}), {}, "neither a comparison nor an evaluation"),
        (
            write(tmp_path / "own", {"d": evaluation("dolly", 1.0, model={"name": "runs/own"})}),
            {},
            "no row own: choose --row",
        ),
        (
            write(
                tmp_path / "two", {"d": evaluation("dolly", 1.0), "v": evaluation("vicuna", 1.0, model={"name": "b"})}
            ),
            {},
            "several models",
        ),
        (
            write(tmp_path / "mean", {"d": evaluation("dolly", 1.0)}),
            {"table": PAIR, "row": "sft"},
            "no score that was pub",
        ),
    ]
    for path, arguments, message in cases:
        with pytest.raises(UserError, match=message):
            compare_with_paper(path, **arguments)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit, match=r"^error: .*broken\.json"):
        main([str(tmp_path / "broken.json")])
    missing = comparison({"sft": 0.1}, 2)
    del missing["variants"]["sft"]["sets"]["sinst-11_-valid"]
    with pytest.raises(UserError, match="the published mean is over"):
        comparison_scores(missing)
