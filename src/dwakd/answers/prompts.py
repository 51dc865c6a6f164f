"""The prompts that a teacher answers, and those of them that also occur in a test set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.sources import EVAL_SPLITS, TRAIN_SPLITS, RowSource, load_examples
from dwakd.evaluation.run import EvaluationPlan
from dwakd.models.loading import load_tokenizer
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import DataSection, ModelSection

logger = logging.getLogger(__name__)


class PromptSet(NamedTuple):
    """The prompts of one file or hub id."""

    source: str
    examples: list[Example]


def read_prompts(recipe: Recipe) -> list[PromptSet]:
    """Read `generate.prompts`, or else the prompts of `data.train`; responses need not exist and are ignored."""
    data, limit = recipe.data, recipe.generate.limit
    sets = []
    for source in recipe.generate.prompts or [data.train]:
        options = _reading(data)
        if same_source(source, data.train):
            options["limit"] = min(filter(None, (limit, data.limit)), default=None)
        else:
            options |= {"limit": limit, "response": None, "teacher_prompt": None, "teacher_key": None}
        examples = load_examples(source, split=TRAIN_SPLITS, need_response=False, **options)
        sets.append(PromptSet(source, [replace(each, response="", references=(), answer=None) for each in examples]))
    return sets


def same_source(one: str, other: str) -> bool:
    """Return whether two names of rows are equal, or name the same file in different ways."""
    (path, _, rows), (other_path, _, other_rows) = one.partition("@"), other.partition("@")
    files = [Path(name).expanduser() for name in (path, other_path)]
    return one == other or (rows == other_rows and all(map(Path.is_file, files)) and files[0].samefile(files[1]))


def is_answered(recipe: Recipe) -> bool:
    """Return whether the prompts of `data.train` are among those to answer, so that its own responses are not used."""
    train = recipe.data.train
    return any(same_source(source, train) for source in recipe.generate.prompts or [train])


def warn_of_duplicates(recipe: Recipe, labelled: Sequence[Example], answered: Sequence[Example]) -> None:
    """Warn if prompts of `data.train`, whose own responses are used, also have an answer of the teacher."""
    known = set(map(_key, labelled))
    if count := len(known.intersection(map(_key, answered))):
        logger.warning(
            "%d prompts are trained on twice, with their response in %s and with the teacher's answer: remove them from "
            "generate.prompts, or name all of %s there to replace its responses",
            *(count, recipe.data.train, recipe.data.train),
        )


def check_prompts(recipe: Recipe, sets: Sequence[PromptSet]) -> None:
    """Raise a UserError that names the row if a prompt cannot be trained on, and the recipe trains on the answers.

    Only the tokenizers are loaded. With `data.invalid_rows: skip`, training leaves such rows out.
    """
    data = recipe.data
    if data.responses != "teacher" or data.invalid_rows == "skip":
        return
    encoders = []
    for section in (recipe.student, *(recipe.teachers if recipe.loss.needs_teacher else ())):
        encoders.append(section_encoder(section, data))
    limits: dict[str, Any] = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
    for one in sets:
        encode_pairs(one.examples, *encoders, **limits, source=one.source, need_response=False)


def section_encoder(section: ModelSection, data: DataSection) -> TextEncoder:
    """Load the tokenizer of a model, with its chat template, and return the encoder that training uses."""
    loading = section.model_dump(include={"revision", "trust_remote_code", "chat_template_path"})
    tokenizer = load_tokenizer(section.model, **loading)
    return TextEncoder(tokenizer, data.template, data.bos, data.special_tokens_in_prompts, date=data.template_date)


def train_source(data: DataSection, *, need_response: bool = True) -> RowSource:
    """Return the rows of `data.train`, which are not read yet; with `need_response` false, rows may have no response."""
    return RowSource(data.train, split=TRAIN_SPLITS, limit=data.limit, need_response=need_response, **_reading(data))


def eval_rows(data: DataSection) -> list[Example] | None:
    """Read the rows of `data.eval`, if there is such a set."""
    if data.eval is None:
        return None
    return load_examples(data.eval, split=EVAL_SPLITS, limit=data.eval_limit, **_reading(data))


def _reading(data: DataSection) -> dict[str, Any]:
    columns = {"prompt", "response", "input", "teacher_prompt", "teacher_key"}
    return data.model_dump(include={*columns, "supervise", "invalid_rows"})


def warn_of_overlap(recipe: Recipe, sets: Sequence[PromptSet], plan: EvaluationPlan) -> None:
    """Warn if prompts also occur in the test sets of a plan or in `data.eval`; case and white space do not matter."""
    held_out = {item.source: item.examples for item in plan.sets if not item.is_text}
    if recipe.data.eval is not None:
        held_out[recipe.data.eval] = eval_rows(recipe.data) or []
    asked = [_key(example) for one in sets for example in one.examples]
    for source, examples in held_out.items():
        known = set(map(_key, examples))
        if count := sum(key in known for key in asked):
            logger.warning(
                "%d of the %d prompts to answer also occur in %s: its scores will be too good; remove them from "
                "generate.prompts",
                *(count, len(asked), source),
            )


def _key(example: Example) -> tuple[str, ...]:
    return tuple(" ".join(str(turn["content"]).casefold().split()) for turn in example.turns)
