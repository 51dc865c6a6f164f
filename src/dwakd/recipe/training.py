"""The training arguments of `DistillTrainer`, which are also the options of a recipe's section `training`."""
# ruff: noqa: RUF009 (`_option` returns a dataclass field)

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, WithJsonSchema
from transformers import TrainingArguments

from dwakd.data.templates import check_date
from dwakd.environment import supports_bfloat16
from dwakd.errors import UserError
from dwakd.losses import MethodOptions, method_options
from dwakd.losses.options import Rate, Steps, Temperature
from dwakd.losses.several_teachers import Gate
from dwakd.recipe.checks import check_combinations, check_method, check_stream, check_terms, from_json, metric_names
from dwakd.recipe.from_dataclass import options_of
from dwakd.recipe.sections import Count, DataSection, LoadingOptions, Seed, Share
from dwakd.validation import parse, unknown_option

if TYPE_CHECKING:
    _Options = dict[str, Any]
else:  # what HfArgumentParser reads as text
    _Options = dict[str, Any] | str | None
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
_NAMES = "template template_date bos special_tokens_in_prompts max_length max_prompt_length"
_NAMES += " invalid_rows supervise teacher_key streaming"
DATA_OPTIONS = tuple(_NAMES.split())
"""Options of the section data that are options of `DistillConfig` with the same names."""
ELSEWHERE = {
    "method": "use loss.method",
    "loss_options": "use the section loss",
    "teacher_weights": "use teacher.weight",
    "teacher_names": "use teacher.name",
    "teacher_cache": "use teacher.cache",
    "trust_remote_code": "use student.trust_remote_code and teacher.trust_remote_code",
    "model_init_kwargs": "use student.dtype, student.revision and so on",
    "teacher_model_init_kwargs": "use teacher.dtype, teacher.revision and so on",
    "chat_template_path": "use student.chat_template_path and teacher.chat_template_path",
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "on_policy": "use lmbda",
    "hub_token": "set the environment variable HF_TOKEN, because the run folder contains the recipe",
    "seq_kd": "use data.responses=teacher",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "leave it out"),
    **{f"{name}_column": f"use data.{name}" for name in ("prompt", "response", "input", "teacher_prompt")},
    **{name: f"use data.{name}" for name in DATA_OPTIONS},
}
"""Options of `DistillConfig` and TRL that the section training does not have, and what to do instead."""


def _option(default: object, description: str) -> Any:
    return field(default=default, metadata={"help": description})


def _data_option(name: str) -> Any:
    """Declare an option with the default and the description that it has in the section data."""
    declared = DataSection.model_fields[name]
    return _option(declared.default, declared.description or "")


def _only(value: object, reason: str) -> AfterValidator:
    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"must stay {value}: {reason}")
        return given

    return AfterValidator(check)


def _check_assignments(text: str) -> str:
    if not all(part.count("=") == 1 for part in text.split(",")):
        raise ValueError("must look like name=value,name=value")
    return text


LIMITS: dict[str, Any] = {
    "max_steps": Count | Literal[-1],
    "remove_unused_columns": Annotated[bool, _only(False, "the method reads every column")],
    "optim_args": Annotated[str, AfterValidator(_check_assignments)] | None,
    "hub_strategy": Literal["end", "every_save"],
    "label_smoothing_factor": Annotated[float, _only(0, "the method defines it")],
    "include_num_input_tokens_seen": Literal["no", False],
    **dict.fromkeys(
        ("batch_eval_metrics", "prediction_loss_only"),
        Annotated[bool, _only(False, "an evaluation computes every term")],
    ),
    "include_for_metrics": Annotated[list[str], _only([], "compute_metrics gets answers and references")],
    "label_names": Annotated[Any, _only(None, "the responses are the labels")],
    "optim_target_modules": Annotated[Any, _only(None, "the optimisers that read it cannot be used")],
    "eval_accumulation_steps": Annotated[Any, _only(None, "an evaluation keeps no logits")],
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        Annotated[bool, _only(False, "evaluation runs in the dtype of the weights")],
    ),
    "use_liger_kernel": Annotated[bool, _only(False, "load a student with Liger")],
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "dataloader_num_workers": Annotated[int, Field(ge=0)],
    "seed": Seed,
    "data_seed": Seed | None,
    "eval_steps": Positive | None,
    "save_steps": Positive,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Count),
    "gradient_accumulation_steps": Count,
    **dict.fromkeys(("warmup_steps", "max_grad_norm", "adam_epsilon"), NotNegative),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Beta),
}
"""Options of transformers whose values are limited, with the types that limit them."""


@dataclass
class DistillConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults and the options of distillation.

    Raises:
        UserError: an option of the method or of the training is unknown, or its value is not allowed.
    """

    method: str = _option("dwa_kd", "Method, one of dwakd.METHODS.")
    loss_options: _Options = field(
        default_factory=dict, metadata={"help": "Options of the method, by name; as JSON on a command line."}
    )
    projector_learning_rate: Positive = _option(1e-3, "Learning rate of the maps between the models.")
    teacher_weights: list[Share] | None = _option(None, "Weights of several teachers. By default they are equal.")
    teacher_gate: Gate = _option(
        "confidence", "Weight several teachers in kd_student by their confidence at each token, or by fixed weights."
    )
    teacher_gate_temperature: Temperature = _option(1.0, "Temperature of the softmax over the teachers' confidences.")
    template: str = _data_option("template")
    template_date: str | None = _data_option("template_date")
    bos: str = _data_option("bos")
    special_tokens_in_prompts: str = _data_option("special_tokens_in_prompts")
    max_length: Count = _data_option("max_length")
    max_prompt_length: Count = _data_option("max_prompt_length")
    invalid_rows: str = _data_option("invalid_rows")
    prompt_column: str | None = _data_option("prompt")
    response_column: str | None = _data_option("response")
    input_column: str | None = _data_option("input")
    teacher_prompt_column: str | None = _data_option("teacher_prompt")
    supervise: str = _data_option("supervise")
    teacher_key: str | None = _data_option("teacher_key")
    streaming: bool = _data_option("streaming")
    teacher_names: list[str] | None = _option(None, "Names of the teachers for teacher_key. Default: their numbers.")
    lmbda: Rate = _option(0.0, "Fraction of the prompts that the current student answers (on-policy training).")
    sampling_temperature: Temperature = _option(1.0, "Temperature of the student's sampling for lmbda.")
    max_new_tokens: Count = _option(128, "Maximum number of tokens of an answer of the student for lmbda.")
    term_gradient_steps: Steps = _option(
        0, "Steps between two measurements of each term's gradient at the student's hidden states; 0 for none."
    )
    term_gradient_limit: Positive | None = _option(
        None,
        "Largest gradient norm of a term, as a multiple of that of ce. The weights of terms with larger norms are reduced. "
        "The norms are measured every 10 steps, or every term_gradient_steps.",
    )
    max_tokens_per_batch: Count | None = _option(
        None,
        "Split each optimiser step into micro-batches of at most this many tokens of all models, with padding if there is any.",
    )
    max_skipped_steps: Steps = _option(
        0, "Number of steps with a NaN or infinite loss or gradient that are skipped; the next such step ends the run."
    )
    padding_free: bool = _option(
        False, "Run the rows of a batch as one sequence without padding, for models loaded with flash attention."
    )
    disable_dropout: bool = _option(False, "Set all dropout rates of the student to 0, but not the noise of routers.")
    teacher_cache: str | None = _option(None, "Folder of the teacher's hidden states. It is built if it is missing.")
    trust_remote_code: bool = _option(False, "Run modelling code from the hub; only for models given by name.")
    model_init_kwargs: _Options | None = _option(
        None,
        "How to load a student given by name: dtype, revision, trust_remote_code, attn_implementation and "
        "quantization_config; as JSON on a command line.",
    )
    teacher_model_init_kwargs: _Options | None = _option(
        None, "The same for teachers given by name, and device_map and tp_plan."
    )
    chat_template_path: str | None = _option(
        None, "Chat template of the student: a file, or another model's folder or hub id. It is saved with the student."
    )
    warmup_ratio: Beta | None = _option(None, "Fraction of the steps with warmup, instead of warmup_steps.")
    eval_rouge_l: bool = _option(False, "Also answer the evaluation prompts and report eval_rouge_l.")
    eval_max_new_tokens: Count = _option(128, "Maximum number of tokens of an answer for eval_rouge_l.")

    # Options of transformers with other defaults
    bf16: bool | None = _option(None, "Mixed precision in bfloat16. Default: on GPUs that support it, without fp16.")
    output_dir: str | None = _option("distilled", "Folder of the checkpoints and the result.")
    learning_rate: Positive = _option(5e-4, "Learning rate of the student.")
    weight_decay: NotNegative = _option(0.01, "Weight decay of AdamW. It does not apply to biases and norms.")
    num_train_epochs: Positive = _option(20.0, "Passes over the training set.")
    lr_scheduler_type: str = _option("cosine", "Schedule of both learning rates.")
    logging_steps: Positive = _option(1, "Optimiser steps between two logs; below 1, a fraction of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Leave it at false; max_skipped_steps sets it where it is needed.")
    save_total_limit: Count | None = _option(2, "Checkpoints to keep, including the best one.")
    metric_for_best_model: str | None = _option(None, "Default: rouge_l with eval_rouge_l, otherwise bits_per_byte.")
    greater_is_better: bool | None = _option(None, "Default: false for bits_per_byte and loss terms, otherwise true.")
    remove_unused_columns: bool = _option(False, "Must be false.")
    ddp_find_unused_parameters: bool | None = _option(
        False, "Not needed: every trained parameter takes part in each step."
    )
    disable_tqdm: bool | None = _option(False, "Show no progress bars.")

    def __post_init__(self) -> None:
        self.template_date = check_date(self.template_date)
        for name in ("loss_options", "model_init_kwargs", "teacher_model_init_kwargs"):
            setattr(self, name, from_json(getattr(self, name), name))
        self.loss_options = self.loss_options or {}
        check_combinations(self)
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise each process of torchrun would train alone
        values = {name: getattr(self, name) for name in TrainingOptions.model_fields}
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            parse(LoadingOptions, values.pop(name) or {}, f"{name}.")
        own = DistillConfig.__annotations__.keys() | LIMITS.keys()  # transformers replaces others by objects
        checked = {n: _number(v) for n, v in values.items() if n in own or isinstance(v, int | float | dict)}
        parse(TrainingOptions, checked)
        check_method(self, self.method_options)
        check_stream(self, self.teacher_cache)
        if self.term_gradient_limit is not None:
            check_terms(self, self.method_options)
            self.term_gradient_steps = self.term_gradient_steps or 10
        if self.warmup_ratio is not None:
            if self.warmup_steps:  # type: ignore[has-type]
                raise UserError("warmup_steps and warmup_ratio are both given: remove one of them")
            # transformers reads a number below 1 as a share
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "rouge_l" if self.eval_rouge_l else "bits_per_byte"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            lower = metric_names(self.method_options, rouge_l=False)
            self.greater_is_better = not f"_{self.metric_for_best_model}".endswith(tuple(f"_{name}" for name in lower))
        self.eval_steps = self.eval_steps or self.save_steps  # type: ignore[has-type]  # instead of logging_steps
        self.logging_nan_inf_filter |= bool(self.max_skipped_steps)  # the logged loss leaves skipped steps out
        by_default = not self.fp16 and supports_bfloat16(use_cpu=self.use_cpu)
        self.bf16 = by_default if self.bf16 is None else self.bf16
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin memory for, and torch would warn

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, as transformers does."""
        options = super().to_dict()
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            if config := (options.get(name) or {}).get("quantization_config"):
                own = config.to_dict() if hasattr(config, "to_dict") else config
                options[name] = options[name] | {"quantization_config": own}
        return options

    @property
    def method_options(self) -> MethodOptions:
        """The options of the method, validated."""
        return method_options(self.method, self.loss_options, "loss_options.")


def _refuse_unknown(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: DistillConfig, *args: Any, **options: Any) -> None:
        valid = [item.name for item in fields(self)]
        for name in options:
            if name not in valid:
                raise unknown_option(name, name, valid)
        init(self, *args, **options)

    return checked


DistillConfig.__init__ = _refuse_unknown(DistillConfig.__init__)  # type: ignore[method-assign]


def _number(value: Any) -> Any:
    """Return numbers of NumPy as Python's, and whole numbers as int, which every numeric option accepts."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


TrainingOptions = options_of(DistillConfig, LIMITS)


def _check_section(options: dict[str, Any]) -> dict[str, Any]:
    for name in options.keys() & ELSEWHERE.keys():
        raise UserError(f"training.{name} does not belong in this section: {ELSEWHERE[name]}")
    parse(TrainingOptions, options, "training.")
    return options


def _schema() -> dict[str, Any]:
    schema = TrainingOptions.model_json_schema()
    properties = {n: p for n, p in schema["properties"].items() if n not in ELSEWHERE}
    return {**schema, "properties": properties}


TrainingSection = Annotated[dict[str, Any], AfterValidator(_check_section), WithJsonSchema(_schema())]
"""The options that a recipe's section training gives; the others have the defaults of `DistillConfig`."""
