"""Run the whole package offline in about five minutes: corpus, tokenizers, teacher, three students and a table."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import evaluate_model
from dwakd.evaluation.options import EvalOptions
from dwakd.evaluation.report import write_evaluation
from dwakd.folders import check_output_folder, write_json
from dwakd.recipe.training import DistillConfig
from dwakd.tools.demo.corpus import make_corpus
from dwakd.tools.demo.tokenizers import demo_tokenizers
from dwakd.training.trainer import DistillTrainer

METHODS = ("sft", "dskd", "dwa_kd")
_SEEDS = 2**32 - 1  # NumPy's largest seed is 2**32 - 1, and the students' models are initialised with seed + 1


@dataclass(frozen=True)
class DemoSizes:
    """Sizes of the data, the models and the training; the defaults take about five minutes on two cores."""

    num_train: int = 10_000
    num_student_rows: int = 1_200
    num_test: int = 200
    teacher_steps: int = 900
    student_steps: int = 1_200
    teacher_width: int = 192
    student_width: int = 128


QUICK = DemoSizes(400, 64, 8, 6, 4, 32, 32)
"""Sizes for a few steps of everything."""


def run_demo(output: Path | None, *, seed: int, quick: bool) -> Group:
    """Train a teacher and students, evaluate them, and return the table to print.

    The models, their scores and demo.json are written to `output`, by default to the first free folder of demo-run,
    demo-run-2 and so on. With `quick`, only a few steps are taken, to check that everything works.

    Raises:
        UserError: the folder is not empty or is a file, or the seed is out of range.
    """
    names = itertools.chain(["demo-run"], (f"demo-run-{number}" for number in itertools.count(2)))
    folder = output or next(path for path in map(Path, names) if not path.exists())
    check_output_folder(folder, empty=True)
    if not 0 <= seed < _SEEDS:
        raise UserError(f"--seed must be from 0 to {_SEEDS - 1}, got {seed}")
    sizes = QUICK if quick else DemoSizes()
    console = Console(stderr=True)
    train, test = make_corpus(sizes.num_train, sizes.num_test, seed)
    tokenizers = demo_tokenizers([text for example in train for text in (example.instruction, example.response)])
    console.print(
        f"The corpus has {len(train):,} instructions. The teacher (vocabulary of {len(tokenizers[1]):,}) is trained "
        f"on all of them, the students (another vocabulary of {len(tokenizers[0]):,}) on {sizes.num_student_rows:,}."
    )
    rows: dict[str, dict[str, Any]] = {}
    for name in ("teacher", *METHODS):
        console.rule("teacher: sft on every row" if name == "teacher" else f"student: {name}")
        rows[name] = _train_and_evaluate(_trainer(name, folder, sizes, train, tokenizers, seed), test, folder)
    write_json(folder / "demo.json", {"seed": seed, "sizes": asdict(sizes), **rows})
    return Group(_table(rows, sizes), f"students: {', '.join(str(folder / method) for method in METHODS)}")


def _trainer(
    name: str,
    folder: Path,
    sizes: DemoSizes,
    train: list[Example],
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    seed: int,
) -> DistillTrainer:
    """Return the trainer of the teacher or of a student that is named after its method."""
    large = name == "teacher"
    tokenizer = tokenizers[large]
    if large:
        width, inner_width, num_layers = sizes.teacher_width, 512, 4
        steps, batch_size, rate = sizes.teacher_steps, 32, 2e-3
    else:
        width, inner_width, num_layers = sizes.student_width, 2 * sizes.student_width, 2
        steps, batch_size, rate = sizes.student_steps, 16, 4e-3
    set_seed(seed if large else seed + 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=not large,
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    )
    args = DistillConfig(
        output_dir=str(folder / name),
        method="sft" if large else name,
        teacher_cache=None if large or name == "sft" else str(folder / "teacher-cache"),
        template="{instruction}\n",
        max_length=128,
        max_prompt_length=96,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rate,
        projector_learning_rate=rate,
        warmup_steps=math.ceil(0.05 * steps),
        save_strategy="no",
        seed=seed,
        data_seed=seed,
        use_cpu=True,
    )
    teacher, rows = (None, train) if large else (str(folder / "teacher"), train[: sizes.num_student_rows])
    names = {"processing_class": tokenizer, "teacher_processing_class": None if large else tokenizers[1]}
    return DistillTrainer(LlamaForCausalLM(config), teacher, args, rows, **names)


def _train_and_evaluate(trainer: DistillTrainer, test: list[Example], folder: Path) -> dict[str, Any]:
    """Return the scores of a model, its seconds per step and its number of parameters."""
    runtime = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    name = Path(trainer.args.output_dir).name
    options = EvalOptions(max_new_tokens=40, batch_size=100)
    evaluation = evaluate_model(trainer.student, trainer.student_encoder, test, options)
    write_evaluation(evaluation, folder / f"{name}.json")
    cost = {"seconds_per_step": runtime / trainer.state.global_step, "parameters": trainer.student.num_parameters()}
    return {**evaluation.to_dict(), **cost}


def _table(rows: dict[str, dict[str, Any]], sizes: DemoSizes) -> Table:
    """Return a table with the scores and the cost of the teacher and the students."""
    table = Table(title="Held-out instructions", title_justify="left", caption_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in ("size", "ROUGE-L", "greedy", "exact", "bits/byte", "s/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['rouge_l']['mean']:.1f} ± {row['rouge_l']['std']:.1f}",
            f"{row['greedy_rouge_l']['mean']:.1f}",
            f"{row['greedy_exact_match']['mean']:.1f}",
            f"{row['bits_per_byte']['value']:.3f}",
            f"{row['seconds_per_step']:.3f}",
        )
    table.caption = (
        f"ROUGE-L of answers sampled at temperature 1 (mean ± standard deviation over five generation seeds) and of "
        f"greedy answers, and exact match of greedy answers, in percent over {sizes.num_test} rows. There is one "
        "training seed, so differences of a point or two are noise. The maps between the models start at random, so "
        "distillation needs many steps to help."
    )
    return table
