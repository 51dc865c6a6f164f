"""Answer the prompts of a recipe, or of rows in memory: the work of `dwakd generate` and of `data.responses: teacher`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.progress import Progress

from dwakd.answers.answers import Answer, Collected, collect
from dwakd.answers.endpoint import EndpointTeacher
from dwakd.answers.local import Advance, LocalTeacher
from dwakd.answers.prompts import (
    PromptSet,
    check_prompts,
    is_answered,
    read_prompts,
    train_source,
    warn_of_duplicates,
    warn_of_overlap,
)
from dwakd.answers.store import AnswerFile, read_request
from dwakd.cache.fingerprint import DATE, adapter_digest, fingerprint, weights_digest
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.environment import global_rank, supports_bfloat16
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import data_identity
from dwakd.evaluation.generate import progress_bar
from dwakd.evaluation.run import EvaluationPlan, load_for_evaluation, plan_evaluation
from dwakd.models.loading import check_vocabulary, load_causal_lm, load_tokenizer, on_device
from dwakd.recipe.recipe import Recipe, load_recipe
from dwakd.recipe.sections import GenerateSection

logger = logging.getLogger(__name__)

_DECODING = ("samples", "temperature", "top_p", "seed", "max_new_tokens")
_PACKAGES = ("dwakd", "torch", "transformers", "tokenizers")


class Teacher(Protocol):
    """Answers prompts: a loaded model or an endpoint."""

    def check(self, examples: Sequence[Example], source: str) -> None: ...

    def answer(self, first: int, examples: Sequence[Example], advance: Advance) -> list[list[Answer]]: ...


class Source(NamedTuple):
    """A teacher that is not loaded yet. `request`: what its answers depend on, by the name of the option."""

    name: str
    request: dict[str, Any]
    load: Callable[[], Teacher]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    rows: Any,
    options: GenerateSection | None = None,
    *,
    template: str = "alpaca",
    bos: str = "auto",
    special_tokens_in_prompts: str = "parse",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Return rows with a teacher's answers, which `DistillTrainer`, `encode_rows` and TRL can train on.

    Args:
        model: the teacher: a loaded causal language model, or the name of one, which runs on the GPU if there is one, in
            bfloat16 if the GPU supports it.
        tokenizer: its tokenizer; may be None if the model is given by name.
        rows: the prompts, in any form that `load_examples` reads; responses are ignored.
        options: how to decode and which answers to leave out; `prompts`, `output` and `endpoint` are not used.
        template: how a row becomes a prompt; `bos` and `special_tokens_in_prompts` as in `TextEncoder`.
        progress: show a progress bar.

    Raises:
        UserError: a prompt is empty or too long for the teacher, or no answer is left.

    Examples:
        >>> answered = answer_prompts("runs/teacher", None, "prompts.jsonl")  # doctest: +SKIP
        >>> trainer = DistillTrainer(..., train_dataset=answered)  # doctest: +SKIP
    """
    options = options or GenerateSection()
    examples = load_examples(rows, need_response=False, limit=options.limit)
    name = model if isinstance(model, str) else model.config.name_or_path or type(model).__name__
    if isinstance(model, str):
        tokenizer = tokenizer or load_tokenizer(model)
        dtype = torch.bfloat16 if supports_bfloat16(use_cpu=False) else torch.float32
        model = load_for_evaluation(model, dtype=dtype)
    if tokenizer is None:
        raise UserError("tokenizer is missing: a model that is passed as an object needs its tokenizer")
    check_vocabulary(model, tokenizer, name)
    teacher = LocalTeacher(model, TextEncoder(tokenizer, template, bos, special_tokens_in_prompts), options)
    teacher.check(examples, "the rows")
    with progress_bar(disable=not progress) as bar:
        answers = teacher.answer(0, examples, _advance(bar, len(examples) * options.samples))
    collected = collect(examples, answers, options, name)
    collected.warn(name)
    return collected.rows


def answer_recipe(
    recipe: Recipe,
    plan: EvaluationPlan | None = None,
    output: str | Path | None = None,
    readers: Sequence[Recipe] = (),
    *,
    write: bool = True,
) -> tuple[AnswerFile, Collected]:
    """Answer the prompts of a recipe, or continue; each rank answers its own part of the prompts.

    Args:
        recipe: its section `generate` says what to answer and how.
        plan: test sets; a warning says how many prompts also occur in them or in the recipe's data.eval.
        output: the file to write; `generate.output` by default.
        readers: recipes that train on the answers; by default this one.
        write: make missing answers and write the file. Otherwise nothing is written, and missing answers are an error.

    Raises:
        UserError: the teacher, the endpoint or the prompts cannot be used, a prompt is too long for the models to train, no
            answer is left, or there are other answers or files at the output.
    """
    options = recipe.generate
    place = output or options.output
    if place is None:
        raise UserError("name the file of the answers with --output or generate.output")
    path = Path(place).expanduser()
    sets = read_prompts(recipe)
    if plan is not None and global_rank() == 0:
        warn_of_overlap(recipe, sets, plan)
    examples = [example for one in sets for example in one.examples]
    source = _source(recipe, path)
    request = source.request | {f"generate.{name}": getattr(options, name) for name in _DECODING}
    request["prompts"] = data_identity(examples)["sha256"]
    file = AnswerFile(path, request, len(examples), options.samples)
    file.open(global_rank(), write=write)
    if write:
        _answer_missing(file, source, sets, readers or [recipe])
    answers = file.read()
    collected = collect(examples, answers, options, source.name)
    if global_rank() == 0 and write:
        collected.warn(source.name)
        file.write(collected.rows, _about(source, options, sets, collected, answers))
    return file, collected


def training_examples(recipe: Recipe, plan: EvaluationPlan | None = None, *, write: bool = True) -> list[Example]:
    """Return the rows to train on with `data.responses: teacher`; `plan` and `write` as in `answer_recipe`.

    They are the answers to `generate.prompts`, and the rows of `data.train` with their own responses unless this data
    set is among the prompts.
    """
    _, collected = answer_recipe(recipe, plan, write=write)
    labelled = [] if is_answered(recipe) else list(train_source(recipe.data))
    if labelled and global_rank() == 0:
        warn_of_duplicates(recipe, labelled, collected.examples)
    rows = [*labelled, *collected.examples]
    return [replace(row, index=index, source=None) for index, row in enumerate(rows)]


def generate_command(path: Path, overrides: list[str], output: Path | None) -> str:
    """Answer the prompts of a recipe file and return the text to print."""
    recipe = load_recipe(path, overrides, "generate")
    file, collected = answer_recipe(recipe, plan_evaluation(recipe), output)
    return (
        f"{file.path}: {len(collected.rows):,} of {file.num_prompts * file.samples:,} answers to {file.num_prompts:,} prompts; "
        f"train on them with data.responses=teacher, or with data.train={file.path}"
    )


def _answer_missing(file: AnswerFile, source: Source, sets: Sequence[PromptSet], readers: Sequence[Recipe]) -> None:
    """Answer the prompts of this rank's shards that are missing."""
    examples = [example.for_teacher() for one in sets for example in one.examples]
    shards = file.shards()
    own = range(global_rank(), len(shards), int(os.environ.get("WORLD_SIZE", "1")))
    missing = [shard for shard in own if file.read_shard(shard) is None]
    if not missing:
        return
    for recipe in readers:
        check_prompts(recipe, sets)
    teacher = source.load()
    for one in sets:
        teacher.check([example.for_teacher() for example in one.examples], one.source)
    done = sum(len(shards[shard]) for shard in own if shard not in missing)
    total = sum(len(shards[shard]) for shard in own)
    with progress_bar(disable=global_rank() != 0) as bar:
        advance = _advance(bar, total * file.samples, done * file.samples)
        for shard in missing:
            rows = shards[shard]
            found = teacher.answer(rows.start, [examples[row] for row in rows], advance)
            file.write_shard(shard, found)
            if shard == missing[0] and {one.finish for samples in found for one in samples} == {"cut"}:
                logger.warning(
                    "all %d answers so far are cut at generate.max_new_tokens=%d; if this goes on, stop, raise it and choose "
                    "another file (generate.output), because %s keeps the answers with the old limit",
                    *(len(rows) * file.samples, file.request["generate.max_new_tokens"], file.parts),
                )


def _advance(bar: Progress, total: int, done: int = 0) -> Advance:
    """Add a line to a progress bar and return the function that advances it."""
    task = bar.add_task("answers", total=total, completed=done)
    return lambda count: bar.advance(task, count)


def _source(recipe: Recipe, path: Path) -> Source:
    """Return the endpoint or else the first teacher of a recipe."""
    data, options = recipe.data, recipe.generate
    skip = data.invalid_rows == "skip"
    if options.endpoint is not None:
        endpoint = options.endpoint
        name = f"{endpoint.model} at {endpoint.base_url}"
        asked = {"generate.endpoint.model": endpoint.model}
        if options.api == "completions":
            asked |= {"generate.api": options.api, "data.template": data.template}
        return Source(name, asked, lambda: EndpointTeacher(endpoint, options, data.template, skip=skip))
    section = recipe.teachers[0]
    loading: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    tokenizer = load_tokenizer(section.model, chat_template_path=section.chat_template_path, **loading)
    date = (read_request(path) or {}).get(DATE) or data.template_date  # a run that continues keeps its date
    encoder = TextEncoder(tokenizer, data.template, data.bos, data.special_tokens_in_prompts, date=date)
    request = fingerprint(
        encoder,
        bos=data.bos,
        max_length=data.max_length,
        teacher=weights_digest(section.model, **loading),
        adapter=None if section.adapter is None else adapter_digest(section.adapter),
        dtype=str(section.dtype),
        quantization=section.quantization_config,
    )
    del request["data.max_length"]  # does not matter here

    def load() -> LocalTeacher:
        if section.tp_plan is not None:
            raise UserError(
                "teacher.tp_plan cannot be used to generate answers, because the processes answer different prompts: use "
                "teacher.device_map in one process, or a server (generate.endpoint)"
            )
        model = load_causal_lm(section.model, **section.loading())
        check_vocabulary(model, tokenizer, section.model)
        return LocalTeacher(on_device(model, _device(recipe)), encoder, options, skip=skip)

    return Source(section.model, request, load)


def _device(recipe: Recipe) -> torch.device:
    """Return this rank's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or recipe.training.get("use_cpu"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def _about(
    source: Source,
    options: GenerateSection,
    sets: Sequence[PromptSet],
    collected: Collected,
    answers: Sequence[Sequence[Answer]],
) -> dict[str, Any]:
    """Return what the manifest says besides the request."""
    lengths = [row["num_tokens"] for row in collected.rows if row["num_tokens"] is not None]
    return {
        "teacher": source.name,
        "prompts": [data_identity(one.examples, one.source) for one in sets],
        "options": options.model_dump(exclude={"prompts", "output"}),
        "num_answers": sum(map(len, answers)),
        "num_rows": len(collected.rows),
        "left_out": collected.left_out,
        "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
        "versions": {name: version(name) for name in _PACKAGES},
    }
