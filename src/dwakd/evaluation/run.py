"""From a model's name and test files to scores on disk and a table: what `dwakd eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from dwakd.config import RECIPE_FILE, Recipe, parse_yaml
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import load_examples
from dwakd.evaluation.evaluate import Evaluation, evaluate_model, evaluation_table, write_evaluation
from dwakd.models.loading import load_causal_lm, load_tokenizer


def evaluate_sets(
    model: str,
    data: list[str],
    *,
    output: Path | None,
    template: str | None,
    adapter: str | None,
    columns: dict[str, Any],
    limit: int | None,
    num_seeds: int,
    **options: Any,
) -> Table:
    """Evaluate a model on each test set; writes SET.json and SET.answers.jsonl and returns the table."""
    recipe = Path(model) / RECIPE_FILE
    shown = parse_yaml(recipe.read_text(encoding="utf-8"))["data"] if recipe.is_file() else {}
    sets = {name: load_examples(name, split="test", limit=limit, **columns) for name in data}
    encoder = TextEncoder(load_tokenizer(model), template or shown.get("template", "alpaca"), shown.get("bos", "auto"))
    loaded = load_causal_lm(model, adapter=adapter)
    folder = output or (Path(model) / "eval" if Path(model).is_dir() else Path("eval") / Path(model).name)
    return _evaluate_all(loaded, encoder, sets, folder, num_seeds, options)


def evaluate_recipe(recipe: Recipe, model: Any, encoder: TextEncoder, folder: Path) -> Table:
    """Evaluate a student just trained on the test sets of its recipe."""
    section, data = recipe.evaluation, recipe.data
    columns: dict[str, Any] = {"prompt": data.prompt, "response": data.response, "input": data.input}
    sets = {name: load_examples(name, split="test", limit=section.limit, **columns) for name in section.test}
    options = {"max_new_tokens": section.max_new_tokens, "batch_size": section.batch_size}
    return _evaluate_all(model, encoder, sets, folder / "eval", section.seeds, options)


def _evaluate_all(
    model: Any, encoder: TextEncoder, sets: dict[str, Any], folder: Path, num_seeds: int, options: dict[str, Any]
) -> Table:
    seeds = [10 * (index + 1) for index in range(num_seeds)]
    rows: dict[str, Evaluation] = {}
    for name, examples in sets.items():
        stem = _stem(name)
        evaluation = evaluate_model(model, encoder, examples, seeds=seeds, **options)
        write_evaluation(evaluation, folder / f"{stem}.json", folder / f"{stem}.answers.jsonl")
        rows[stem] = evaluation
    return evaluation_table(rows)


def _stem(name: str) -> str:
    """A file name for a test set: p3/test.jsonl gives p3-test."""
    path = Path(name)
    parts = [*path.parts[-2:-1], path.stem] if path.suffix else path.parts[-2:]
    return "-".join(part for part in parts if part not in ("/", ".", ".."))
