"""The training arguments of `DistillTrainer`."""

import math
import sys
import typing
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments

from dwakd.errors import UserError
from dwakd.losses import method_class
from dwakd.losses.several_teachers import GATES

SAMPLING = ("random", "sequential", "group_by_length")
_POSITIVE, _COUNT = (0, sys.float_info.max, "above 0 and finite"), (0, math.inf, "at least 1")
_SIZE, _BETA = (-1e-300, math.inf, "0 or more"), (-1e-300, math.nextafter(1, 0), "0 or more and below 1")
_SEED = (-1e-300, 2**32 - 1, "0 or more and below 2**32")
RANGES: dict[str, tuple[float, float, str]] = {
    "learning_rate": _POSITIVE,
    "projector_learning_rate": _POSITIVE,
    "teacher_gate_temperature": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "max_steps": (0, math.inf, "at least 1, or -1 to count epochs"),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_max_new_tokens": _COUNT,
    "max_length": _COUNT,
    "max_prompt_length": _COUNT,
    "save_total_limit": _COUNT,
    "weight_decay": _SIZE,
    "max_grad_norm": _SIZE,
    "warmup_steps": _SIZE,
    "seed": _SEED,
    "data_seed": _SEED,
    "adam_epsilon": _SIZE,
    "dataloader_num_workers": _SIZE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
}
"""Options with a lower bound, which must be exceeded, the largest value, and what to say of both."""
FIXED = {
    "remove_unused_columns": (False, "the collator's tensors are no arguments of the student"),
    "use_liger_kernel": (False, "apply Liger to a student that you load yourself"),
    "label_smoothing_factor": (0.0, "the cross-entropy is the method's own"),
}


@dataclass
class DistillConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults and the fields of distillation."""

    method: str = field(default="dwa_kd", metadata={"help": "Method, one of dwakd.METHODS."})
    loss_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Keyword options of the method's loss class."}
    )
    projector_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the maps between the models."}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of several teachers in the loss; equal by default."}
    )
    teacher_gate: str = field(
        default="confidence",
        metadata={"help": "Of several teachers, trust token by token: confidence; or always their weights."},
    )
    teacher_gate_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the softmax over the teachers' confidences."}
    )
    template: str = field(
        default="alpaca",
        metadata={"help": "alpaca, chat, plain, or a format string with {instruction} and {input}."},
    )
    bos: str = field(default="auto", metadata={"help": "auto: where the model's convention wants it; or never."})
    special_tokens_in_prompts: str = field(
        default="parse", metadata={"help": "Special tokens spelled out in a row's prompt: parse them, or text."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Most tokens of prompt and response, on either side; truncates by text."}
    )
    max_prompt_length: int = field(default=256, metadata={"help": "Most tokens of the prompt, on either side."})
    invalid_rows: str = field(
        default="error", metadata={"help": "Malformed rows, empty responses, too long prompts: error or skip."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompt; guessed if absent."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the response; guessed if absent."})
    input_column: str | None = field(default=None, metadata={"help": "Column of the optional input."})
    disable_dropout: bool = field(
        default=False, metadata={"help": "Set each dropout of the student to 0, not router noise."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the teacher's hidden states, built if it isn't there; see docs/cache.md."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code from the hub; only for models given by name."}
    )
    eval_rouge_l: bool = field(
        default=False, metadata={"help": "Also answer the evaluation prompts and report eval_rouge_l."}
    )
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Longest answer for eval_rouge_l."})

    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "rouge_l where eval_rouge_l is on, else bits_per_byte; or any logged term."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Known for rouge_l, bits_per_byte and the terms; true for other metrics."}
    )
    output_dir: str | None = field(default="distilled", metadata={"help": "Where checkpoints and the result go."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the student."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, not on biases and norms."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the training set."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(default=1, metadata={"help": "Optimiser steps between two logs."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave at False: a loss that is NaN or infinite ends the run."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best included."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Leave at False."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter of a method takes part in each step."}
    )
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trackers to log to."})

    def __post_init__(self) -> None:
        self._check()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "rouge_l" if self.eval_rouge_l else "bits_per_byte"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            lower = (*method_class(self.method).terms, "loss", "bits_per_byte")
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in lower
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for, and torch warns of it

    def _check(self) -> None:
        self._check_ranges()
        for name, (only, why) in FIXED.items():
            if getattr(self, name) != only:
                raise UserError(f"{name} must stay {only}: {why}")
        for name, valid in {"train_sampling_strategy": SAMPLING, "teacher_gate": GATES}.items():
            if getattr(self, name) not in valid:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; valid ones: {', '.join(valid)}")
        if not isinstance(self.teacher_weights, list | None):
            raise UserError(f"teacher_weights must be a list of numbers, got {self.teacher_weights!r}")
        for weight in self.teacher_weights or []:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-30 <= weight <= 1e30:
                raise UserError(f"teacher_weights must be a list of numbers between 1e-30 and 1e30, got {weight!r}")
        if not isinstance(self.loss_options, dict):
            raise UserError(f"loss_options must be a dict of the method's options, got {self.loss_options!r}")
        if not all(part.count("=") == 1 for part in (self.optim_args or "a=b").split(",")):
            raise UserError(f"optim_args must look like name=value,name=value, got {self.optim_args!r}")

    def _check_ranges(self) -> None:
        for name, (low, high, what) in RANGES.items():
            value = getattr(self, name)
            if value is None or (name == "max_steps" and value == -1):
                continue
            number = isinstance(value, Real)
            if not (number and low < value <= high):
                raise UserError(f"{name} must be {what if number else 'a number'}, got {value!r}")
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            value, kinds = getattr(self, item.name), typing.get_args(hints[item.name]) or (hints[item.name],)
            for number in _as_list(list(value.values()) if isinstance(value, dict) else value):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{item.name} must be finite, got {value!r}")
            if isinstance(value, float) and int in kinds and float not in kinds and not value.is_integer():
                raise UserError(f"{item.name} must be a whole number, got {value!r}")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
