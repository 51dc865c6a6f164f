"""From a recipe to a finished student folder: what `dwakd train` does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import re
import resource
import statistics
import sys
import typing
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dwakd.cache.files import write_whole
from dwakd.config import RECIPE_FILE, Recipe, StudentSection, TeacherSection, parse_yaml, read_saved_recipe
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example, load_examples
from dwakd.errors import UserError
from dwakd.evaluation.run import check_recipe_evaluation, check_room
from dwakd.folders import check_output_folder
from dwakd.losses import ModelPair, Widths, build_loss, method_class
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.options import check_type, unknown_option
from dwakd.training.cached import CachedTeacher, refuse_attention
from dwakd.training.card import write_card
from dwakd.training.checkpoint import checkpoint_fault, load_student
from dwakd.training.config import DistillConfig
from dwakd.training.optimizer import check_optimizer
from dwakd.training.trainer import LOSS_STATE, DistillTrainer

logger = logging.getLogger(__name__)

RUN_FILE = "dwakd-run.json"
LOCK_FILE = ".lock"
CHANGEABLE = re.compile(r"evaluation\.|training\.(max_steps|num_train_epochs|disable_tqdm)$")
"""Options that may differ when a run is resumed."""
CHECKPOINT = re.compile(r"checkpoint-\d+")
ELSEWHERE = ("method", "loss_options", "output_dir", "trust_remote_code", "teacher_cache", "teacher_weights")
IGNORED = ("resume_from_checkpoint", "do_train", "do_eval", "do_predict")
DATA_FIELDS = ("template", "bos", "max_length", "max_prompt_length", "invalid_rows")


def training_config(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """The recipe's `training` section as a DistillConfig; its `data` and `loss` sections filled in.

    Raises:
        UserError: an unknown option, one that belongs to another section, or a value transformers refuses.
    """
    valid = [item.name for item in dataclasses.fields(DistillConfig) if item.init]
    hints = typing.get_type_hints(DistillConfig)
    for name in recipe.training:
        if name in (*DATA_FIELDS, *ELSEWHERE):
            raise UserError(f"training.{name} belongs elsewhere: in data, loss, student, teacher, or --output")
        if name in IGNORED:
            hint = "go on with a run by --resume" if name == "resume_from_checkpoint" else "leave it out"
            raise UserError(f"training.{name} has no effect here; {hint}")
        if name not in valid:
            raise unknown_option(f"training.{name}", name, valid)
        check_type(hints[name], recipe.training[name], f"training.{name}")
    options = dict(recipe.training)
    if recipe.data.eval is not None:
        options.setdefault("eval_strategy", "epoch")
    for name in ("eval_strategy", "eval_rouge_l", "load_best_model_at_end", "metric_for_best_model"):
        if recipe.data.eval is None and options.get(name) not in (None, False, "no"):
            raise UserError(f"training.{name} needs an evaluation set: give data.eval")
    if recipe.data.eval is None and options.get("save_strategy") == "best":
        raise UserError("training.save_strategy=best needs an evaluation set: give data.eval")
    _check_best_metric(recipe, options)
    try:
        return DistillConfig(
            output_dir=str(output_dir),
            method=recipe.method,
            loss_options=recipe.loss_options,
            teacher_weights=[teacher.weight for teacher in recipe.teachers] if len(recipe.teachers) > 1 else None,
            **{name: getattr(recipe.data, name) for name in DATA_FIELDS},
            **{"save_strategy": options.get("eval_strategy", "epoch"), **options},
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        hint = "; on a machine without a GPU set training.use_cpu=true" if "use_cpu" in str(error) else ""
        raise UserError(f"training options: {' '.join(str(error).split())}{hint}") from error


def _check_best_metric(recipe: Recipe, options: dict[str, Any]) -> None:
    """An unknown metric would show only after the first evaluation."""
    if "metric_for_best_model" not in options:
        return
    terms = (*method_class(recipe.method).terms, "loss", "bits_per_byte")
    valid = [*terms, "rouge_l"] if options.get("eval_rouge_l") else list(terms)
    name = options["metric_for_best_model"].removeprefix("eval_")
    if name not in valid:
        hint = " with training.eval_rouge_l=true" if name == "rouge_l" else ""
        raise UserError(
            f"unknown training.metric_for_best_model {name}{hint and ', which exists' + hint}; valid ones: "
            + ", ".join(valid)
        )


def check_output(folder: Path, *, resume: bool, recipe: Recipe) -> str | None:
    """The checkpoint to resume from, or None for a fresh folder.

    Raises:
        UserError: the folder already holds a run and `resume` is off, or holds another recipe's run.
    """
    if os.environ.get("RANK", "0") != "0":  # the first rank speaks for all, before it writes anything
        return last_checkpoint(folder) if resume and folder.exists() else None
    check_output_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    started = any(RECIPE_FILE not in name for name in names - {LOCK_FILE})
    if not started:  # a run that broke before its first checkpoint leaves its recipe at the most
        return None
    saved = folder / RECIPE_FILE
    if not saved.is_file():
        raise UserError(f"output folder {folder} is not empty and holds no run of dwakd; choose another with --output")
    if not resume:
        raise UserError(
            f"output folder {folder} already holds a run; choose another with --output, or --resume to go on with it"
        )
    check_same_recipe(saved, recipe, changeable=CHANGEABLE)
    return last_checkpoint(folder)


def check_same_recipe(saved: Path, recipe: Recipe, *, changeable: re.Pattern[str]) -> None:
    """Refuse a run's folder whose saved recipe differs in more than options that match `changeable`.

    Raises:
        UserError: it holds another run, of which it says which option differs; or the saved recipe is damaged.
    """
    before = _flat(read_saved_recipe(saved, mend="restore it, or choose another folder with --output"))
    now = _flat(parse_yaml(recipe.dump()))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and not changeable.match(name):
            was, is_now = before.get(name, "unset"), now.get(name, "unset")
            raise UserError(
                f"output folder {saved.parent} holds another run: {name} is {was} there and {is_now} here; choose "
                "another with --output"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name; of several teachers, those of the second begin with teacher.2."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0] if len(value) == 1 else {str(k): item for k, item in enumerate(value, start=1)}
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; one cut off in the writing is passed over with a warning."""
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", LOSS_STATE)
    steps = {int(path.name.split("-")[1]): path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)}
    for step in sorted(steps, reverse=True):
        fault = checkpoint_fault(steps[step], needed)
        if fault is None:
            return str(steps[step])
        logger.warning("%s is not whole and is passed over: its %s", steps[step], fault)
    if steps:
        logger.warning("no checkpoint in %s is whole: training starts from the beginning", folder)
    return None


def load_section(section: StudentSection | TeacherSection) -> tuple[Any, Any]:
    """The model (or the cached teacher) and the tokenizer of a section."""
    dtype = getattr(torch, section.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"unknown dtype {section.dtype!r} for {section.model}; float32, bfloat16 and float16 are known")
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    adapter = getattr(section, "adapter", None)
    if isinstance(section, TeacherSection) and section.cache is not None:
        stored = section.cache_dtype
        teacher = CachedTeacher(
            section.cache, section.model, adapter=adapter, dtype=dtype, cache_dtype=stored, **options
        )
        return teacher, teacher.tokenizer
    return (
        load_causal_lm(section.model, dtype=dtype, adapter=adapter, **options),
        load_tokenizer(section.model, **options),
    )


def _peft_config(options: dict[str, Any] | None) -> LoraConfig | None:
    if options is None:
        return None
    valid = [item.name for item in dataclasses.fields(LoraConfig)]
    hints = typing.get_type_hints(LoraConfig)
    for name in options:
        if name not in valid:
            raise unknown_option(f"student.peft.{name}", name, valid)
        check_type(hints[name], options[name], f"student.peft.{name}")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    except (ValueError, TypeError) as error:
        raise UserError(f"student.peft: {error}") from error


def recipe_examples(recipe: Recipe) -> tuple[list[Example], list[Example] | None]:
    """The rows to train on and, if there are any, to evaluate on."""
    data = recipe.data
    if data.eval_limit is not None and data.eval_limit < 1:
        raise UserError(f"data.eval_limit must be at least 1, got {data.eval_limit}")
    columns: dict[str, Any] = {"prompt": data.prompt, "response": data.response, "input": data.input}
    train = load_examples(data.train, limit=data.limit, **columns)
    if data.eval is None:
        return train, None
    return train, load_examples(data.eval, split="validation", limit=data.eval_limit, **columns)


def check_options(recipe: Recipe, output_dir: str | Path) -> tuple[DistillConfig, LoraConfig | None]:
    """The training arguments and adapter of a recipe, every option checked; reads no data and no model."""
    method = method_class(recipe.method)
    build_loss(recipe.method, recipe.loss_options, widths=Widths(1, 1, 1, 1), pair=ModelPair.smallest())
    if method.needs_teacher and not recipe.teachers:
        raise UserError(f"method {recipe.method} needs a teacher: add a teacher section to the recipe")
    for teacher in recipe.teachers:
        if not 0 < teacher.weight < math.inf:
            raise UserError(f"teacher.weight must be a number above 0, got {teacher.weight!r}")
    if any(teacher.cache is not None for teacher in recipe.teachers):
        refuse_attention(recipe.method, recipe.loss_options)
    args = training_config(recipe, output_dir)
    check_optimizer(args)
    return args, _peft_config(recipe.student.peft)


def build_trainer(recipe: Recipe, output_dir: str | Path) -> DistillTrainer:
    """Load data, models and loss of a recipe into a trainer; mistakes show before a model is loaded where they can."""
    method = method_class(recipe.method)
    args, peft_config = check_options(recipe, output_dir)
    for section in recipe.teachers:
        if section.cache is None and section.cache_dtype is not None:
            raise UserError("teacher.cache_dtype is of a cache: name its folder in teacher.cache, or leave it out")
    sets = check_recipe_evaluation(recipe)
    train, evaluation = recipe_examples(recipe)
    names = {"train": recipe.data.train, "eval": recipe.data.eval or ""}
    student, student_tokenizer = load_section(recipe.student)
    check_room(student, TextEncoder(student_tokenizer, args.template, args.bos), sets)
    teachers = [load_section(section) for section in recipe.teachers] if method.needs_teacher else []
    try:
        return DistillTrainer(
            model=student,
            teacher_model=[teacher for teacher, _ in teachers],
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=student_tokenizer,
            teacher_processing_class=[tokenizer for _, tokenizer in teachers],
            peft_config=peft_config,
            dataset_names=names,
        )
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or (type(error) is RuntimeError and "requires" not in str(error)):
            raise
        raise UserError(f"training options: {error}") from error  # a tracker or a backend that isn't installed


def train(recipe: Recipe, output_dir: str | Path, *, resume: bool = False) -> DistillTrainer:
    """Run a recipe; the folder ends up as a plain Hugging Face model with the recipe and versions beside it."""
    folder = Path(output_dir)
    checkpoint = check_output(folder, resume=resume, recipe=recipe)
    finished = resume and _is_finished(folder, recipe)
    steps_left = finished or _steps_left(checkpoint, recipe)
    trainer = build_trainer(recipe, folder)
    if finished:
        _restore(trainer, folder)
        return trainer
    with _alone_in(folder) if trainer.is_world_process_zero() else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            write_whole(folder / RECIPE_FILE, [recipe.dump().encode()])
        if steps_left:
            trainer.train(resume_from_checkpoint=checkpoint)
        else:  # it broke off between its last checkpoint and its end; transformers would take a step more
            _restore(trainer, Path(str(checkpoint)))
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            write_card(recipe, folder)
            (folder / RUN_FILE).write_text(json.dumps(run_record(trainer), indent=2) + "\n", encoding="utf-8")
    return trainer


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder came to its end, and is to be no longer now."""
    if not (folder / RUN_FILE).is_file():
        return False
    before, now = (_flat(parse_yaml(text)) for text in ((folder / RECIPE_FILE).read_text("utf-8"), recipe.dump()))
    lengths = ("training.max_steps", "training.num_train_epochs")
    return all(before.get(name) == now.get(name) for name in lengths)


def _steps_left(checkpoint: str | None, recipe: Recipe) -> bool:
    """Whether a run goes on beyond a checkpoint, where `max_steps` says so.

    Raises:
        UserError: the checkpoint is beyond `max_steps`.
    """
    limit = recipe.training.get("max_steps", -1)
    if checkpoint is None or limit <= 0:
        return True
    done = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if done > limit:
        raise UserError(
            f"{checkpoint} is of step {done}, beyond training.max_steps {limit}: raise it, or choose another folder with "
            "--output"
        )
    return bool(done < limit)


def _restore(trainer: DistillTrainer, folder: Path) -> None:
    """The student of a finished run, or the best or last of a run's checkpoints, with the state of its training."""
    trainer.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    load_student(trainer.student, folder if (folder / RUN_FILE).is_file() else best or folder)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, made if it isn't there.

    Raises:
        UserError: another process trains into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is training into {folder}: wait for it, or choose another with --output"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (folder / LOCK_FILE).unlink(missing_ok=True)


def end_of_run() -> None:
    """Leave the process group together; a rank that exits first aborts the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads can outlive the interpreter and abort the process after all is done


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_record(trainer: DistillTrainer) -> dict[str, Any]:
    """What made a run: versions and the models' revisions; and what it cost, the median time of a step."""
    packages = ("dwakd", "torch", "transformers", "tokenizers", "peft", "datasets", "accelerate", "numba")
    teachers = [getattr(teacher, "model", None) for teacher in trainer.teachers]
    return {
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "student_revision": getattr(trainer.student.config, "_commit_hash", None),
        "teacher_revisions": [getattr(getattr(model, "config", None), "_commit_hash", None) for model in teachers],
        "teacher_caches": [str(getattr(teacher, "folder", "")) or None for teacher in trainer.teachers],
        "num_steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(trainer.clock.seconds) if trainer.clock.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "num_train_examples": len(trainer.train_dataset),
        "world_size": trainer.args.world_size,
    }
