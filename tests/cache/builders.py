"""Build tiny teachers, and short training runs with an online teacher or a cache."""

from pathlib import Path
from typing import Any

from dwakd import DistillConfig, DistillTrainer
from dwakd.training.teacher import CachedTeacher
from tests.builders import tiny_model
from tests.training.builders import ROWS, TOKENIZERS

STUDENT, TEACHER = TOKENIZERS
LONG = [
    {"prompt": row["prompt"] * (1 + n % 3), "response": row["response"] * (1 + n % 4)} for n, row in enumerate(ROWS)
]
"""Prompts and responses of different lengths, so that batches are padded."""


def save_teacher(folder: Path, family: str = "gemma2", *, seed: int = 2, **overrides: Any) -> Path:
    """Save a random teacher with its tokenizer and return the folder."""
    tiny_model(family, len(TEACHER), seed=seed, **overrides).save_pretrained(folder)
    TEACHER.save_pretrained(folder)
    return folder


def trainer(output: Path, teacher: Path, *, cache: Path | None = None, **options: Any) -> DistillTrainer:
    """Return a trainer; if `cache` is given, the teacher is read from this cache."""
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"template": "plain", "use_cpu": True, "seed": 3}
    rows, eval_rows = options.pop("rows", LONG), options.pop("eval_rows", None)
    names = options.pop("dataset_names", None)
    return DistillTrainer(
        model=tiny_model("llama", len(STUDENT), seed=1),
        teacher_model=str(teacher),
        args=DistillConfig(
            output_dir=str(output), teacher_cache=None if cache is None else str(cache), **{**arguments, **options}
        ),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=STUDENT,
        dataset_names=names,
    )


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a cache."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def repair(folder: Path, teacher: Path) -> None:
    """Run `dwakd cache` on an existing cache."""
    run = trainer(folder.parent / "online", teacher)
    cached = CachedTeacher(folder, str(teacher))
    cached.prepare(run.encoders[1], run.args, {"train": run.train_dataset, "eval": None}, repair=True)
