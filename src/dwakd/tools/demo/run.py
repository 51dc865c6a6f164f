"""Show the real use of the package offline: a pretrained student, few labelled rows, and a teacher that answers prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console, Group
from rich.table import Table
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from dwakd.compare.compare import compare_methods
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.folders import check_output_folder, write_file, write_json
from dwakd.recipe.recipe import load_recipe
from dwakd.recipe.training import DistillConfig
from dwakd.tools.demo.corpus import make_corpus
from dwakd.tools.demo.tokenizers import demo_tokenizers
from dwakd.training.trainer import DistillTrainer

TEMPLATE = "{instruction}\n"
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"loss.method": "sft"},
    "dskd": {"loss.method": "dskd"},
    "dwa_kd, paper": {"loss.variant": "paper"},
    "dwa_kd": {},
    "seqkd": {"loss.method": "sft", "data.responses": "teacher"},
    "seqkd + alm": {"loss.method": "alm", "data.responses": "teacher"},
    "seqkd + dwa_kd": {"data.responses": "teacher"},
    "seqkd + dwa_kd + alm": {
        "loss": [{"method": "dwa_kd", "variant": "recommended"}, {"method": "alm"}],
        "data.responses": "teacher",
    },
}
"""Rows of the table, as overrides of the recipe. Those with the teacher's answers take twice as many steps."""
_SEEDS = 2**32 - 1  # NumPy's largest seed is 2**32 - 1, and the student's model is initialised with seed + 1
_RATE = 2e-3


@dataclass(frozen=True)
class DemoSizes:
    """Sizes of the data, the models and the training; the defaults take about eight minutes on two cores."""

    num_prompts: int = 10_000
    num_labelled: int = 1_200
    num_test: int = 400
    teacher_steps: int = 900
    pretraining_steps: int = 600
    student_steps: int = 600
    teacher_width: int = 192
    student_width: int = 128


QUICK = DemoSizes(400, 64, 8, 6, 4, 4, 32, 32)
"""Sizes for a few steps of everything."""


def run_demo(output: Path | None, *, seed: int, quick: bool) -> Group:
    """Make the data and the models, run a comparison on them, and return the table and its conclusions.

    Everything is written to `output`, by default to the first free folder of demo-run, demo-run-2 and so on: the data, the
    teacher, the pretrained student, recipe.yaml and the folder of the comparison. `dwakd compare` runs the recipe again with
    other rows or seeds. With `quick`, only a few steps are taken, to check that everything works.

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
    train, test = make_corpus(sizes.num_prompts, sizes.num_test, seed)
    student_tokenizer, teacher_tokenizer = demo_tokenizers([text for row in train for text in _texts(row)])
    _write_rows(folder / "labelled.jsonl", train[: sizes.num_labelled])
    _write_rows(folder / "prompts.jsonl", train[sizes.num_labelled :], answered=False)
    _write_rows(folder / "test.jsonl", test)
    console.rule(f"teacher: fine-tuning on {len(train):,} answered prompts (vocabulary of {len(teacher_tokenizer):,})")
    _train_teacher(folder / "teacher", sizes, train, teacher_tokenizer, seed)
    console.rule(f"student: pretraining on the prompts as raw text (vocabulary of {len(student_tokenizer):,})")
    _pretrain_student(folder / "student", sizes, train, student_tokenizer, seed)
    console.rule(f"comparison on {sizes.num_labelled:,} labelled rows, and with the teacher's answers (seqkd)")
    path = folder / "recipe.yaml"
    write_file(path, yaml.safe_dump(demo_recipe(folder, sizes, seed), sort_keys=False).encode())
    compare_methods(load_recipe(path, [], "compare"), folder / "comparison", jobs=2)
    rows = json.loads((folder / "comparison" / "comparison.json").read_text(encoding="utf-8"))["variants"]
    write_json(folder / "demo.json", {"seed": seed, "sizes": asdict(sizes)})
    sentences = (
        ["These scores are those of a few steps and do not compare the methods."] if quick else conclusions(rows)
    )
    return Group(_table(rows, sizes), "", *sentences, "", f"recipe, data, models and all numbers: {folder}")


def demo_recipe(folder: Path, sizes: DemoSizes, seed: int) -> dict[str, Any]:
    """Return the recipe of the comparison."""
    twice = {"training.max_steps": 2 * sizes.student_steps}
    return {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {
            "train": str(folder / "labelled.jsonl"),
            "template": TEMPLATE,
            "max_length": 128,
            "max_prompt_length": 96,
        },
        "generate": {
            "prompts": [str(folder / "prompts.jsonl")],
            "output": str(folder / "answers.jsonl"),
            "max_new_tokens": 40,
            "batch_size": 200,
        },
        "loss": {"method": "dwa_kd", "variant": "recommended"},
        "training": {
            "max_steps": sizes.student_steps,
            "per_device_train_batch_size": 16,
            "learning_rate": _RATE,
            "projector_learning_rate": _RATE,
            "warmup_steps": 0.05,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "evaluation": {
            "test": [str(folder / "test.jsonl")],
            "seeds": 3,
            "temperatures": [1.0, 0.7],
            "max_new_tokens": 40,
            "batch_size": 100,
        },
        "compare": {
            "seeds": [seed],
            "rows": {name: row | (twice if "data.responses" in row else {}) for name, row in ROWS.items()},
        },
    }


def _texts(row: Example) -> tuple[str, str]:
    return row.instruction, row.response


def _write_rows(path: Path, rows: list[Example], *, answered: bool = True) -> None:
    """Write prompts and, if they are answered, all accepted responses, of which the first one is trained on."""
    lines = []
    for row in rows:
        others = [text for text in row.references if text != row.response]
        columns = {"prompt": row.instruction} | ({"response": [row.response, *others]} if answered else {})
        lines.append(json.dumps(columns, ensure_ascii=False))
    write_file(path, ("\n".join(lines) + "\n").encode())


def _model(tokenizer: PreTrainedTokenizerFast, width: int, inner_width: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=num_layers == 2,
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    )
    return LlamaForCausalLM(config)


def _train_teacher(
    folder: Path, sizes: DemoSizes, rows: list[Example], tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    set_seed(seed)
    args = DistillConfig(
        output_dir=str(folder),
        method="sft",
        template=TEMPLATE,
        max_length=128,
        max_prompt_length=96,
        max_steps=sizes.teacher_steps,
        per_device_train_batch_size=32,
        learning_rate=_RATE,
        warmup_steps=0.05,
        save_strategy="no",
        seed=seed,
        data_seed=seed,
        use_cpu=True,
    )
    trainer = DistillTrainer(
        _model(tokenizer, sizes.teacher_width, 512, 4), None, args, rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()


def _pretrain_student(
    folder: Path, sizes: DemoSizes, rows: list[Example], tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Train a language model on the prompts, with transformers alone."""
    set_seed(seed + 1)
    model = _model(tokenizer, sizes.student_width, 2 * sizes.student_width, 2)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=sizes.pretraining_steps,
        per_device_train_batch_size=32,
        learning_rate=2 * _RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    encoded = [{"input_ids": tokenizer(f"{row.instruction}\n")["input_ids"]} for row in rows]
    trainer = Trainer(model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), encoded)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _table(rows: Mapping[str, Mapping[str, Any]], sizes: DemoSizes) -> Table:
    """Return a table with the scores and the training time of the teacher and the students."""
    title = "ROUGE-L, exact match, bits per byte and calibration error on unseen prompts"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.HORIZONTALS, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("T=1", "T=0.7", "greedy", "exact", "bits", "ECE", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, "failed")
            continue
        steps = sizes.student_steps * (2 if name.startswith("seqkd") else 1)
        seconds = row["seconds_per_step"]
        table.add_row(
            name,
            f"{row['rouge_l']:.1f}",
            f"{row['other_temperatures']['0.7']:.1f}",
            f"{row['greedy_rouge_l']:.1f}",
            f"{row['greedy_exact_match']:.1f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['ece']:.1f}",
            "" if seconds is None else f"{seconds * steps:.0f}",
        )
    table.caption = (
        f"ROUGE-L of answers sampled at two temperatures and of greedy answers, exact match of greedy answers (both in "
        f"percent), bits per byte of the references (lower is better) and calibration error in percent, over "
        f"{sizes.num_test} prompts. Students with seqkd also train on the teacher's answers to "
        f"{sizes.num_prompts - sizes.num_labelled:,} prompts. dwa_kd is its recommended variant."
    )
    return table


def conclusions(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in three sentences which student is better, by how much, and how large the noise is."""
    finished = {name: row for name, row in rows.items() if row.get("versus")}
    sentences = []
    if {"sft", "dwa_kd"} <= finished.keys():
        sentences.append(
            f"On the labelled rows, dwa_kd against sft: {_differences(finished['dwa_kd']['versus']['sft'])}."
        )
    others = [name for name in finished if name.startswith("seqkd +")]
    if "seqkd" in finished and others:
        best = min(others, key=lambda name: finished[name]["bits_per_byte"])
        sentences.append(
            f"On the teacher's answers, {best} has the fewest bits per byte of the methods with a teacher; against seqkd: "
            f"{_differences(finished[best]['versus']['seqkd'])}."
        )
    sentences.append(
        "The intervals are 95 % intervals over test prompts, with one training seed. Another seed can change a score by one "
        "or two more points (see docs/results/demo.md)."
    )
    return sentences


def _differences(found: Mapping[str, Any]) -> str:
    greedy, bits = found["greedy_rouge_l"], found["bits_per_byte"]
    return "{:+.1f} greedy ROUGE-L [{:+.1f}, {:+.1f}] and ".format(
        *greedy
    ) + "{:+.3f} bits per byte [{:+.3f}, {:+.3f}]".format(*bits)
