"""Predict the memory and the time of a training from a few steps, which write no file."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from dwakd.batch import TokenBatch
from dwakd.cache.manifest import MANIFEST, TEACHER, keyed_sides
from dwakd.cache.store import Cache, local_folder
from dwakd.data.encoded import EncodedPairs, EncodedRow
from dwakd.errors import UserError
from dwakd.evaluation.run import EvaluationPlan
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.sections import TeacherSection
from dwakd.recipe.training import DistillConfig
from dwakd.training.callbacks import out_of_memory_explained
from dwakd.training.run import build_trainer, peak_memory_bytes, training_config
from dwakd.training.teacher import CachedTeacher, OnlineTeacher, Teacher
from dwakd.training.teachers import sets_of_teacher
from dwakd.training.trainer import DistillTrainer

_WARM_UP, _TIMED = 2, 4  # optimiser steps: one of the shortest and one of the longest rows, then a sample of all rows
_OPTIONS = dict.fromkeys(("load_best_model_at_end", "push_to_hub", "eval_on_start"), False) | {
    **dict.fromkeys(("eval_strategy", "save_strategy"), "no"),
    "max_steps": _WARM_UP + _TIMED,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "report_to": "none",
}


class CachePrediction(NamedTuple):
    is_configured: bool
    num_bytes: int
    build_seconds: float


class Prediction(NamedTuple):
    """What a training will need. Times are without the loading of models and data, and without writing checkpoints."""

    parameters: dict[str, tuple[int, int]]  # number of parameters of each model, and of those that are trained
    memory: dict[str, int]  # bytes of each part
    peak_bytes: int  # 0 on Windows without a GPU
    num_steps: int
    steps_per_epoch: int
    step_seconds: float
    teacher_seconds: float  # part of step_seconds in which teachers run
    evaluation_seconds: float  # one evaluation, without generated answers
    num_evaluations: int
    caches: list[CachePrediction | None]  # of each teacher; None if it has a complete cache or cannot have one

    @property
    def build_seconds(self) -> float:
        return sum(cache.build_seconds for cache in self.caches if cache and cache.is_configured)

    @property
    def seconds(self) -> float:
        return self.build_seconds + self.num_steps * self.step_seconds + self.num_evaluations * self.evaluation_seconds


class _StepClock(TrainerCallback):
    """Measure the optimiser steps after the warm-up, and the time of each teacher and the tokens that it reads."""

    def __init__(self, teachers: list[Teacher]) -> None:
        self._ends: list[float] = []
        self._counts = [[0.0, 0.0] for _ in teachers]
        for teacher, counts in zip(teachers, self._counts, strict=True):
            setattr(teacher, "states", partial(self._timed, teacher.states, counts))  # noqa: B010 (for mypy)

    def _timed(self, states: Callable[[TokenBatch], Any], counts: list[float], tokens: TokenBatch) -> Any:
        started = _now()
        found = states(tokens)
        counts[:] = counts[0] + _now() - started, counts[1] + sum(tokens.num_tokens)
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends.append(_now())
        if len(self._ends) == _WARM_UP:
            self.take()

    def take(self) -> list[list[float]]:
        """Return seconds and tokens of each teacher since the last call."""
        found = [counts.copy() for counts in self._counts]
        for counts in self._counts:
            counts[:] = 0.0, 0.0
        return found

    def seconds(self) -> float:
        return self._ends[-1] - self._ends[_WARM_UP - 1]


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def predict(recipe: Recipe, plan: EvaluationPlan | None = None) -> tuple[Prediction, list[EncodedRow]]:
    """Train a few steps and return what the whole training will need, and the three longest rows."""
    if recipe.data.streaming or any(section.url is not None for section in recipe.teachers):
        raise UserError("--dry-run cannot be used with data.streaming or teacher.url: start without --dry-run")
    sections = [_with_complete_cache(section) for section in recipe.teachers]
    teacher = sections if isinstance(recipe.teacher, list) else next(iter(sections), None)
    with tempfile.TemporaryDirectory() as empty:
        args = training_config(recipe, empty)
        timed = recipe.replace(training={**recipe.training, **_OPTIONS}, teacher=teacher)
        trainer = build_trainer(timed, empty, plan, write=False)
        pairs: EncodedPairs = trainer.train_dataset
        rows = sorted(pairs.rows, key=lambda row: row.student.length)
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        first = _spread(rows[:size], size) + _spread(rows[::-1][:size], size)
        trainer.train_dataset = replace(pairs, rows=first + _sample(rows, _TIMED * size))
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        clock = _StepClock(trainer.teachers)
        trainer.add_callback(clock)
        with out_of_memory_explained(trainer):
            trainer.train()
        peak, of_steps = peak_memory_bytes() or 0, clock.take()
        both = zip(recipe.teachers, sections, trainer.teachers, strict=False)
        once = [given.cache != used.cache for given, used, _ in both]  # run only for caches that will be built
        sets, evaluation = {"train": pairs}, 0.0
        for _, own in trainer.eval_sets.values():
            sets["eval"], started = own, _now()
            part = _sample(own.rows, min(_TIMED * args.eval_batch_size * args.world_size, len(own)))
            trainer.evaluate(replace(own, rows=part))
            evaluation = (_now() - started - _sum(clock.take(), once)) * len(own) / len(part)
    num_rows = len(rows) - len(rows) % (args.train_batch_size * args.world_size) * args.dataloader_drop_last
    per_epoch = -(-num_rows // size)
    num_steps = args.max_steps if args.max_steps > 0 else -int(-args.num_train_epochs * per_epoch // 1)
    full = num_rows / (per_epoch * size) / _TIMED  # the last step of an epoch may have fewer rows
    found = Prediction(
        **_parts(trainer, before, peak),
        peak_bytes=peak,
        num_steps=num_steps,
        steps_per_epoch=per_epoch,
        step_seconds=full * (clock.seconds() - _sum(of_steps, once)),
        teacher_seconds=full * _sum(of_steps, [not one for one in once]),
        evaluation_seconds=evaluation,
        num_evaluations=_num_evaluations(args, num_steps, per_epoch),
        caches=[_cache(recipe, n, own, sets, *of_steps[n]) for n, own in enumerate(trainer.teachers)],
    )
    return found, rows[:-4:-1]


def _with_complete_cache(section: TeacherSection) -> TeacherSection:
    """Return the section, without its cache if a file of it is missing."""
    folder = None if section.cache is None else local_folder(section.cache)
    if folder is not None and (folder / MANIFEST).is_file():
        cache = Cache.open(folder)
        if all(path.is_file() for path in (folder / TEACHER, *map(cache.shard_path, range(cache.num_shards)))):
            return section
    return section.model_copy(update={"cache": None, "cache_dtype": None})


def _spread(rows: list[EncodedRow], count: int) -> list[EncodedRow]:
    """Return `count` rows that are spread evenly over the given ones; if there are fewer, some are repeated."""
    return [rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


def _sample(rows: Sequence[EncodedRow], count: int) -> list[EncodedRow]:
    """Return rows with the same distribution of lengths, in random order."""
    return random.Random(0).sample(_spread(sorted(rows, key=lambda row: row.student.length), count), count)


def _sum(counts: list[list[float]], chosen: list[bool]) -> float:
    return sum(seconds for (seconds, _), is_chosen in zip(counts, chosen, strict=True) if is_chosen)


def _num_evaluations(args: DistillConfig, num_steps: int, steps_per_epoch: int) -> int:
    if args.eval_strategy == "no":
        return 0
    every = steps_per_epoch if args.eval_strategy == "epoch" else args.eval_steps or 1
    every = max(int(every * num_steps if every < 1 else every), 1)
    first = args.eval_delay * (steps_per_epoch if args.eval_strategy == "epoch" else 1)
    due = {*range(every, num_steps, every), num_steps}  # the last one is at the end
    return sum(step >= first for step in due) + bool(args.eval_on_start)


def _cache(
    recipe: Recipe, index: int, teacher: Teacher, sets: dict[str, EncodedPairs], seconds: float, tokens: float
) -> CachePrediction | None:
    """Predict the cache of a teacher that has none, from the time in which it has read some tokens."""
    if isinstance(teacher, CachedTeacher) or recipe.loss.needs_attention or recipe.training.get("lmbda"):
        return None
    section = recipe.teachers[index]
    sides = dict(keyed_sides(*filter(None, sets_of_teacher(sets, index).values()))).values()
    dtype = getattr(torch, section.cache_dtype) if section.cache_dtype else teacher.head.weight.dtype
    states = sum(len(side.byte_ends) for side in sides) * teacher.head.hidden_size * dtype.itemsize
    size = states + _bytes({one.data_ptr(): one for one in (teacher.table, teacher.head.weight)}.values())
    return CachePrediction(section.cache is not None, size, seconds * sum(side.length for side in sides) / tokens)


def _parts(trainer: DistillTrainer, before: int, peak: int) -> dict[str, Any]:
    """Return the parameters of each model, and the parts of the peak; `before` is the memory before the first step."""
    models = {"student": list(trainer.student.parameters())}
    for number, teacher in enumerate(trainer.teachers, start=1):
        online = isinstance(teacher, OnlineTeacher)
        kept = teacher.model.parameters() if online else (teacher.table, teacher.head.weight)  # type: ignore[attr-defined]
        name = f"{teacher_name(number, trainer.teachers)}{'' if online else ': head and embeddings'}"
        models[name] = list({one.data_ptr() or id(one): one for one in kept}.values())
    if maps := [value for name, value in trainer.model.named_parameters() if "student" not in name.split(".")[:2]]:
        models["maps of the loss"] = maps
    trained = {name: [one for one in own if one.requires_grad] for name, own in models.items()}
    memory = {f"weights: {name}": _bytes(own) for name, own in models.items()}
    libraries = max(before - sum(memory.values()), 0)
    states = (trainer.optimizer.state if trainer.optimizer is not None else {}).values()
    memory["gradients"] = sum(map(_bytes, trained.values()))
    memory["optimiser state"] = _bytes(one for own in states for one in own.values() if isinstance(one, Tensor))
    if not torch.cuda.is_available():
        memory["Python, libraries and data"] = libraries
    memory["activations and buffers"] = max(peak - sum(memory.values()), 0)
    numbers = {n: tuple(sum(one.numel() for one in part) for part in (own, trained[n])) for n, own in models.items()}
    return {"parameters": numbers, "memory": memory}


def _bytes(tensors: Iterable[Tensor]) -> int:
    flat = [(one, one.__tensor_flatten__()[0] if hasattr(one, "__tensor_flatten__") else ()) for one in tensors]
    return sum(sum(getattr(one, name).nbytes for name in names) if names else one.nbytes for one, names in flat)


def teacher_name(number: int, teachers: list[Any]) -> str:
    """Return what tables call a teacher: its number, from 1, is left out if it is the only one."""
    return "teacher" if len(teachers) == 1 else f"teacher {number}"
