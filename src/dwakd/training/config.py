"""The training arguments of `DistillTrainer`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments


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
    template: str = field(
        default="alpaca",
        metadata={"help": "alpaca, chat, plain, or a format string with {instruction} and {input}."},
    )
    bos: str = field(default="auto", metadata={"help": "auto: where the model's convention wants it; or never."})
    max_length: int = field(
        default=512, metadata={"help": "Most tokens of prompt and response, on either side; truncates by text."}
    )
    max_prompt_length: int = field(default=256, metadata={"help": "Most tokens of the prompt, on either side."})
    invalid_rows: str = field(
        default="error", metadata={"help": "Rows with an empty response or too long a prompt: error or skip."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompt; guessed if absent."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the response; guessed if absent."})
    input_column: str | None = field(default=None, metadata={"help": "Column of the optional input."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the student to 0."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run modelling code from the hub; only for models given by name."}
    )
    eval_rouge_l: bool = field(
        default=False, metadata={"help": "Also answer the evaluation prompts and report eval_rouge_l."}
    )
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Longest answer for eval_rouge_l."})

    output_dir: str | None = field(default="distilled", metadata={"help": "Where checkpoints and the result go."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the student."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, not on biases and norms."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the training set."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(default=1, metadata={"help": "Optimiser steps between two logs."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best included."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Leave at False."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter of a method takes part in each step."}
    )
    disable_tqdm: bool | None = field(default=False, metadata={"help": "No progress bars."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trackers to log to."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for, and torch warns of it
