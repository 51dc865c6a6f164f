"""Train a student as a recipe describes: the work of `dwakd train`."""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dwakd.answers.prompts import eval_rows, is_answered, train_source
from dwakd.answers.run import training_examples
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example, RowSource
from dwakd.environment import hardware
from dwakd.errors import UserError
from dwakd.evaluation.run import EvaluationPlan, check_room
from dwakd.folders import alone_in, write_file, write_json
from dwakd.models.loading import check_embeddings, check_positions, load_causal_lm, load_config, load_tokenizer
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import ModelSection, TeacherSection, lora_config
from dwakd.recipe.training import DATA_OPTIONS, DistillConfig
from dwakd.training.arguments import check_schedule
from dwakd.training.callbacks import out_of_memory_explained
from dwakd.training.card import PACKAGES
from dwakd.training.checkpoints import disk_errors_explained, from_first_rank
from dwakd.training.distiller import load_student
from dwakd.training.hub import UploadError
from dwakd.training.inputs import encode_source
from dwakd.training.interruption import stops_on_signal
from dwakd.training.lost_ranks import lost_ranks_explained
from dwakd.training.run_folder import RUN_FILE, check_output, has_steps_left, is_finished, saved_date
from dwakd.training.served import ServedTeacher
from dwakd.training.sharding import check_plugin
from dwakd.training.teacher import CachedTeacher, Teacher
from dwakd.training.teachers import make_encoders
from dwakd.training.trainer import DistillTrainer


def training_config(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """Return the training arguments of a recipe; raise UserError if transformers refuses an option."""
    options = dict(recipe.training)
    usual = "steps" if recipe.data.streaming else "epoch"
    if recipe.data.streaming and (recipe.data.responses == "teacher" or "num_train_epochs" in options):
        name = "data.responses: teacher" if recipe.data.responses == "teacher" else "training.num_train_epochs"
        raise UserError(f"{name} needs all rows: remove it, or set data.streaming: false")
    if recipe.data.eval is not None:
        options.setdefault("eval_strategy", usual)
    options.setdefault("save_strategy", options.get("eval_strategy", usual))
    try:
        return DistillConfig(
            output_dir=str(output_dir),
            method=recipe.method,
            loss_options=recipe.loss_options,
            teacher_weights=[teacher.weight for teacher in recipe.teachers] if len(recipe.teachers) > 1 else None,
            teacher_names=recipe.teacher_names or None,
            **recipe.data.model_dump(include=set(DATA_OPTIONS)),
            **options,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        hint = "; on a machine without a GPU set training.use_cpu=true" if "use_cpu" in str(error) else ""
        raise UserError(f"training options: {' '.join(str(error).split())}{hint}") from error


def check_options(recipe: Recipe, output_dir: str | Path) -> DistillConfig:
    """Return the training arguments of a recipe, with an optimiser and a schedule that can be built.

    Raises:
        UserError: transformers or another package refuses an option.
    """
    args = training_config(recipe, output_dir)
    check_schedule(args)
    return args


def open_section(section: ModelSection) -> tuple[Teacher | None, Any]:
    """Load the tokenizer of a section and no model; return also the teacher if it is on a server or has a cache."""
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
    tokenizer = load_tokenizer(section.model, chat_template_path=section.chat_template_path, **options)
    if isinstance(section, TeacherSection) and section.url is not None:
        return ServedTeacher(section, tokenizer), tokenizer
    if isinstance(section, TeacherSection) and section.cache is not None:
        stored = section.cache_dtype and getattr(torch, section.cache_dtype)
        loading = section.loading() | {"cache_dtype": stored, "tokenizer": tokenizer}
        return CachedTeacher(section.cache, section.model, **loading), tokenizer
    return None, tokenizer


def recipe_encoders(
    sections: Sequence[ModelSection], sides: Sequence[tuple[Teacher | None, Any]], args: DistillConfig
) -> tuple[TextEncoder, ...]:
    """Make the encoders of the sections that `open_section` has opened, and check the limits of their models.

    The limits are in the configurations of the models, so no weights are loaded.

    Raises:
        UserError: a model has fewer positions than `data.max_length`.
    """
    encoders = make_encoders(sides, args)
    for section, encoder in zip(sections, encoders, strict=True):
        if isinstance(section, TeacherSection) and section.url is not None:
            continue
        config = load_config(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
        check_positions(config, section.model, args.max_length)
        encoder.num_embeddings = getattr(config.get_text_config(), "vocab_size", None)
        if encoder.num_embeddings is not None:
            check_embeddings(encoder.tokenizer, encoder.num_embeddings, section.model)
    return encoders


def recipe_examples(
    recipe: Recipe, plan: EvaluationPlan | None = None, *, write: bool = True
) -> tuple[list[Example] | RowSource, list[Example] | None]:
    """Return the rows to train on and, if the recipe has an evaluation set, those to evaluate on.

    Given rows are read when they are encoded.

    With `data.responses: teacher` the teacher's answers are made if they are missing; `plan` and `write` as in
    `answer_recipe`.
    """
    if recipe.data.responses == "teacher":
        return training_examples(recipe, plan, write=write), eval_rows(recipe.data)
    on_policy = recipe.training.get("lmbda") == 1
    return train_source(recipe.data, need_response=not on_policy), eval_rows(recipe.data)


def train_name(recipe: Recipe) -> str:
    """Return the name of the rows to train on in messages, in which rows are numbered as `recipe_examples` returns them."""
    data, answers = recipe.data, recipe.generate
    if data.responses == "given":
        return data.train
    others = "" if is_answered(recipe) else f"the rows of {data.train}, then "
    return f"{others}the answers in {answers.output}"


def build_trainer(
    recipe: Recipe, output_dir: str | Path, plan: EvaluationPlan | None = None, *, write: bool = True
) -> DistillTrainer:
    """Load the data and the models of a recipe into a trainer; check that the student has room for the plan's prompts.

    The teacher's answers are made if they are missing, unless `write` is false. The rows to train on are encoded before the
    models are loaded, so that an error in a row is reported first.
    """
    args = check_options(recipe, output_dir)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # before the models are loaded
        check_plugin(FullyShardedDataParallelPlugin())
    if any(section.device_map for section in recipe.teachers):
        args._n_gpu = min(args.n_gpu, 1)  # the teacher is on the other GPUs
    peft, data = recipe.student.peft, recipe.data
    examples, eval_examples = recipe_examples(recipe, plan, write=write)
    sections = recipe.teachers if recipe.loss.needs_teacher else []
    sides = [open_section(section) for section in (recipe.student, *sections)]
    encoders = recipe_encoders((recipe.student, *sections), sides, args)
    _, rows = encode_source(examples, encoders, args, "train", train_name(recipe))
    student = load_causal_lm(recipe.student.model, **recipe.student.loading())
    if plan is not None:
        check_room(plan, student, encoders[0])
    opened = zip(sides[1:], sections, strict=True)
    teachers = [teacher or load_causal_lm(section.model, **section.loading()) for (teacher, _), section in opened]
    try:
        trainer = DistillTrainer(
            model=student,
            teacher_model=teachers,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_examples,
            processing_class=sides[0][1],
            teacher_processing_class=[tokenizer for _, tokenizer in sides[1:]],
            peft_config=None if peft is None else lora_config(peft),
            dataset_names={"eval": data.eval or ""},
        )
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or (type(error) is RuntimeError and "requires" not in str(error)):
            raise
        raise UserError(f"training options: {error}") from error  # a tracker or a backend that is not installed
    trainer.recipe = recipe.content()
    return trainer


def _dated(recipe: Recipe, date: str | None) -> Recipe:
    """Return the recipe with the date that its chat templates print, unless it has one."""
    if date is None or recipe.data.template_date is not None:
        return recipe
    return recipe.replace(data=recipe.data.model_copy(update={"template_date": date}))


def train(
    recipe: Recipe,
    output_dir: str | Path,
    plan: EvaluationPlan | None = None,
    *,
    resume: bool = False,
    hook: Any = None,
) -> DistillTrainer:
    """Train as a recipe describes; save the student as a plain Hugging Face model, with the recipe and versions.

    `hook` takes the trainer and returns a callback for it.

    Raises:
        RunInterrupted: Ctrl-C, SIGTERM or SIGUSR1 stopped the training; its last checkpoint is in the folder.
    """
    folder = Path(output_dir)
    checkpoint = check_output(folder, resume=resume, recipe=recipe)
    finished = resume and is_finished(folder, recipe)
    steps_left = not finished and has_steps_left(checkpoint, recipe)
    recipe = _dated(recipe, saved_date(folder) if resume else None)
    trainer = build_trainer(recipe, folder, plan)
    recipe = _dated(recipe, next((one.printed_date for one in trainer.encoders if one.printed_date), None))
    trainer.recipe = recipe.content()
    checkpoint, finished, steps_left = from_first_rank((checkpoint, finished, steps_left))
    trainer.verified_checkpoint = checkpoint
    if hook is not None:
        trainer.add_callback(hook(trainer))
    failed: UploadError | None = None
    if finished:
        _restore(trainer, folder)
        load_student(trainer.student, folder)
        if trainer.args.push_to_hub and trainer.is_world_process_zero():  # an upload may have failed
            trainer.upload(folder, "End of training")
        return trainer
    with alone_in(folder) if trainer.is_world_process_zero() else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            (folder / RUN_FILE).unlink(missing_ok=True)  # a finished run that is made longer is not finished any more
            write_file(folder / RECIPE_FILE, recipe.dump().encode())
        if steps_left:
            with stops_on_signal(trainer), out_of_memory_explained(trainer), lost_ranks_explained(trainer):
                trainer.train(resume_from_checkpoint=checkpoint)
        else:  # the run was stopped after its last checkpoint; transformers would take another step
            _restore(trainer, Path(str(checkpoint)))
            best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
            if best:
                trainer.check_checkpoint(best)
            trainer.model.load_checkpoint(best or checkpoint)
        with disk_errors_explained(folder):
            try:
                trainer.save_model()
            except UploadError as error:  # the run is finished nevertheless
                failed = error
            trainer.save_state()
            if trainer.is_world_process_zero():
                write_json(folder / RUN_FILE, run_record(trainer))
    if failed is not None:
        raise failed
    return trainer


def _restore(trainer: DistillTrainer, folder: Path) -> None:
    """Load the state of training from a folder."""
    trainer.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))


def peak_memory_bytes() -> int | None:
    """Return the largest memory of the GPU, or else of this process, in use so far; None on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_record(trainer: DistillTrainer) -> dict[str, Any]:
    """Return versions, hardware, revisions of the models, and the cost of a run with the median time of a step."""
    teachers = [getattr(teacher, "model", None) for teacher in trainer.teachers]
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "hardware": hardware(),
        "student_revision": getattr(trainer.student.config, "_commit_hash", None),
        "teacher_revisions": [getattr(getattr(model, "config", None), "_commit_hash", None) for model in teachers],
        "teacher_caches": [str(getattr(teacher, "folder", "")) or None for teacher in trainer.teachers],
        "num_steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(trainer.clock.seconds) if trainer.clock.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "num_train_examples": None if trainer.args.streaming else len(trainer.train_dataset),
        "world_size": trainer.args.world_size,
    }
