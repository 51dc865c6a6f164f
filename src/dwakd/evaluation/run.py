"""Read test sets, evaluate models on them, write scores to disk and show a table: the work of `dwakd eval`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Group
from rich.text import Text

from dwakd.cache.fingerprint import json_digest
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import SUFFIXES, TEST_SPLITS, Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.card import update_results
from dwakd.evaluation.evaluate import (
    data_identity,
    evaluate_model,
    evaluate_text,
    evaluation_signature,
    model_identity,
    text_signature,
)
from dwakd.evaluation.generate import answerable_prompts
from dwakd.evaluation.metrics import has_reference
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.evaluation.report import check_overwrite, evaluation_table, write_evaluation
from dwakd.folders import check_output_folder
from dwakd.models.loading import check_vocabulary, load_causal_lm, load_tokenizer, on_device
from dwakd.models.rows import check_head
from dwakd.recipe.files import RECIPE_FILE, read_saved_recipe

if TYPE_CHECKING:  # the recipe imports losses
    from dwakd.recipe.recipe import Recipe

_LONGEST, _KEPT = 220, 150  # bytes of a set's name; most file systems allow 255 in the names of files, which are longer


@dataclass(frozen=True)
class EvaluationSet:
    """A test set. Either all of its rows have references or a response, or none has (see `scored`)."""

    name: str
    """Unique among the sets evaluated together, and valid as a file name."""
    source: str
    examples: list[Example]
    is_text: bool = False
    """Whether the rows are texts without a prompt, which `evaluate_text` evaluates."""

    @property
    def scored(self) -> bool:
        """Whether there are references or responses that answers can be compared with."""
        return has_reference(self.examples[0])

    @property
    def digest(self) -> str:
        """The digest of the rows that is in the signature of the scores."""
        return str(data_identity(self.examples)["sha256"])


class EvaluationPlan(NamedTuple):
    """What to evaluate, read and validated before a model is loaded."""

    sets: list[EvaluationSet]
    options: EvalOptions
    rows: RowOptions


def plan_evaluation(recipe: Recipe) -> EvaluationPlan:
    """Read the test sets of a recipe as `read_test_sets` does; needs no model."""
    section = recipe.evaluation
    names = set(RowOptions.model_fields) - {"limit"}
    rows = RowOptions(limit=section.limit, **recipe.data.model_dump(include=names))
    options = EvalOptions(**section.model_dump(exclude={"test", "text", "limit"}))
    return EvaluationPlan(read_test_sets(section.test, rows, section.text), options, rows)


def read_test_sets(data: Sequence[str], rows: RowOptions, text: Sequence[str] = ()) -> list[EvaluationSet]:
    """Read and check the test sets `data` and the sets of texts, files or hub ids, in this order; needs no model.

    Raises:
        UserError: a set is named twice, cannot be read, or has references in some rows only.
    """
    sets: list[EvaluationSet] = []
    for number, source in enumerate([*data, *text]):
        if any(other.source == source for other in sets):
            raise UserError(f"the test set {source} is named twice: name it once")
        name = _free_name(source, [other.name for other in sets])
        if number >= len(data):
            found = load_examples(source, split=TEST_SPLITS, prompt="text", limit=rows.limit, need_response=False)
            texts = [Example(example.index, "", response=example.instruction) for example in found]
            sets.append(EvaluationSet(name, source, texts, is_text=True))
            continue
        examples = load_examples(source, split=TEST_SPLITS, need_response=False, **rows.reading())
        lacking = [example.index for example in examples if not has_reference(example)]
        if 0 < len(lacking) < len(examples):
            raise UserError(
                f"{source}: {len(lacking)} of {len(examples)} rows have no response and no references, for example row "
                f"{lacking[0]} (counting from 0): add references to these rows or remove them"
            )
        sets.append(EvaluationSet(name, source, examples))
    return sets


def _free_name(source: str, taken: Sequence[str]) -> str:
    """Name a set by its folder and file: p3/test.jsonl becomes p3-test, or p3-test-2 if that name is taken."""
    path = Path(source)
    last = path.stem if path.suffix.lower() in SUFFIXES else path.name
    parts = [part for part in (*path.parts[-2:-1], last) if part not in ("/", ".", "..", "~")]
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-") or "test"
    if len(name.encode()) > _LONGEST:
        name = f"{name.encode()[:_KEPT].decode(errors='ignore')}-{json_digest(name)[:8]}"
    used, candidate, number = {other.casefold() for other in taken}, name, 2
    while candidate.casefold() in used:  # some file systems ignore the case of letters
        candidate, number = f"{name}-{number}", number + 1
    return candidate


def check_room(plan: EvaluationPlan, model: Any, encoder: TextEncoder) -> None:
    """Raise a UserError that names set and row if the template refuses a row, or a prompt leaves no room for an answer."""
    for item in plan.sets:
        if not item.is_text:
            answerable_prompts(model, encoder, item.examples, item.source)
            for example in item.examples:
                try:
                    encoder.with_response(example)
                except UserError as error:
                    raise UserError(f"{item.source}, {error}") from error


def evaluate_sets(
    model: str,
    data: list[str],
    rows: RowOptions,
    options: EvalOptions,
    *,
    text: Sequence[str] = (),
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    template_date: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    **more: Any,
) -> Group:
    """Evaluate a model on test sets, write SET.json and SET.answers.jsonl, and return the table to print.

    The model runs on the GPU or other accelerator if there is one.

    Args:
        model: folder, hub id or GGUF file.
        data: files or hub ids.
        rows: template, bos and special_tokens_in_prompts are by default those of the recipe in the adapter's folder, or else in
            the model's.
        options: options of the answers.
        text: files or hub ids with a column `text`, for bits per byte without a prompt.
        adapter: a PEFT adapter to merge into the model.
        dtype: dtype of the weights.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run the Python code of a hub repository.
        chat_template_path: a chat template from elsewhere, as in `load_tokenizer`.
        template_date: the date that chat templates print; by default that of the recipe, or else today.
        output: folder of the results; by default eval/ in the folder of the adapter or model.
        overwrite: replace results of the same name with another signature, which are otherwise an error.
        more: other options of `load_causal_lm`.

    Raises:
        UserError: the model or the data cannot be used, or there are other results in the output folder.
    """
    evaluated, trained = adapter or model, trained_folder(model, adapter)
    folder = results_folder(evaluated, output)
    plan = EvaluationPlan(read_test_sets(data, rows, text), options, rows)
    loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    reading = {**loading, "chat_template_path": chat_template_path}
    encoder = text_encoder_of(trained, rows, recipe_of=trained, date=template_date, **reading)
    loaded = load_for_evaluation(model, adapter=adapter, dtype=dtype, **loading, **more)
    check_vocabulary(loaded, encoder.tokenizer, model)
    check_room(plan, loaded, encoder)
    table = evaluate_plan(plan, loaded, encoder, folder, name=evaluated, overwrite=overwrite)
    if folder == Path(evaluated).expanduser() / "eval":
        update_results(folder.parent)
    return table


def results_folder(model: str, output: Path | None, name: str = "eval") -> Path:
    """Return the folder of the results, by default NAME/ in the model's, and check that it can be written."""
    path = Path(model).expanduser()
    folder = output or (path / name if path.is_dir() else Path(name) / path.name)
    check_output_folder(folder)
    return folder


def trained_folder(model: str, adapter: str | None) -> str:
    """Return the folder with tokenizer and recipe: that of the adapter if `dwakd train` wrote it, else that of the model."""
    return adapter if adapter is not None and (Path(adapter).expanduser() / RECIPE_FILE).is_file() else model


def text_encoder_of(
    model: str, rows: RowOptions, *, recipe_of: str, date: str | None = None, **loading: Any
) -> TextEncoder:
    """Load the tokenizer of `model`. Options that are None come from the recipe in the folder `recipe_of`, if there is one."""
    recipe = Path(recipe_of).expanduser() / RECIPE_FILE
    fix = "restore it, or remove it and give --template and --bos"
    saved = read_saved_recipe(recipe, fix=fix)["data"] if recipe.is_file() else {}
    trained_with = {name: saved[name] for name in ("template", "bos", "special_tokens_in_prompts") if name in saved}
    date = date or saved.get("template_date")
    return TextEncoder(load_tokenizer(model, **loading), **rows.rendering(**trained_with), date=date)


def load_for_evaluation(model: str, **options: Any) -> Any:
    """Load a model onto the accelerator, if there is one, and check its output head; `options` as in `load_causal_lm`."""
    loaded = load_causal_lm(model, **options)
    if torch.accelerator.is_available():
        on_device(loaded, torch.accelerator.current_accelerator())
    check_head(loaded)
    return loaded


def evaluate_plan(
    plan: EvaluationPlan, model: Any, encoder: TextEncoder, folder: Path, *, name: str, overwrite: bool
) -> Group:
    """Evaluate a loaded model as `evaluate_sets` does; `name` stands for it in the results."""
    weights, options = model_identity(model, name), plan.options
    signatures, rows = {}, {}
    for item in plan.sets:
        describe = text_signature if item.is_text else evaluation_signature
        signatures[item.name] = describe(model, encoder, item.examples, options, weights, item.source)
        if not overwrite:
            check_overwrite(folder / f"{item.name}.json", signatures[item.name])
    for item in plan.sets:
        evaluate = evaluate_text if item.is_text else evaluate_model
        rows[item.name] = evaluate(model, encoder, item.examples, options, signature=signatures[item.name])
        write_evaluation(rows[item.name], folder / f"{item.name}.json")
    where = Text(f"answers and scores with their signature: {folder}", no_wrap=True, overflow="ignore")
    return Group(evaluation_table(rows), where)
