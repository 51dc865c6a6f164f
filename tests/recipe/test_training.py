"""Test the training arguments in a recipe and in `DistillConfig`."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, HfArgumentParser

from dwakd import DistillConfig, UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.inputs import loading_options


def in_recipe(**options: Any) -> None:
    content = {"student": {"model": "x"}, "data": {"train": "x"}, "loss": {"method": "sft"}, "training": options}
    recipe_from_dict(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", float("inf")),
        ("per_device_train_batch_size", 2.5),
        ("gradient_accumulation_steps", float("inf")),
        ("max_steps", 1.5),
        ("max_steps", 0),
        ("seed", 2**70),
        ("eval_max_new_tokens", 4.5),
        ("neftune_noise_alpha", float("inf")),
        ("lr_scheduler_kwargs", {"num_cycles": float("inf")}),
        ("adam_epsilon", float("inf")),
        ("adam_beta1", 2),
        ("weight_decay", float("inf")),
        ("weight_decay", -1),
        ("eval_delay", float("nan")),
        ("learning_rate", "1e-3"),
        ("dataloader_num_workers", -1),
        ("teacher_gate", "best"),
        ("train_sampling_strategy", "foo"),
        ("optim_args", "foo"),
        ("remove_unused_columns", True),
        ("label_smoothing_factor", 0.1),
        ("use_liger_kernel", True),
    ],
)
def test_values_that_no_run_can_use_are_refused_by_name(tmp_path, name, value):
    """Values that no run can use are refused, with the name of the option, before models are loaded."""
    with pytest.raises(UserError, match=rf"^training\.{name}"):
        in_recipe(**{name: value})
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
    setattr(config, name, value)  # the type checker refuses it in the constructor
    with pytest.raises(UserError, match=f"^{name}"):
        config.__post_init__()


@pytest.mark.parametrize("weights", [["a", 1], 3, [1e40, 1.0], [1.0, -1.0]])
def test_weights_of_teachers_are_positive_numbers(tmp_path, weights):
    """Weights of teachers must be positive."""
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
    config.teacher_weights = weights
    with pytest.raises(UserError, match=r"^teacher_weights"):
        config.__post_init__()


def test_options_of_the_method_are_checked_at_once(tmp_path):
    """Options of the method are validated when the arguments are created, before a teacher is loaded."""
    with pytest.raises(UserError, match=r"unknown option loss_options\.temperatures.* did you mean temperature"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, loss_options={"temperatures": 2.0})
    config = DistillConfig(
        output_dir=str(tmp_path), use_cpu=True, method="sra", loss_options={"span_weights": "uniform"}
    )
    assert not config.method_options.needs_attention


def test_numbers_of_other_types_are_accepted(tmp_path):
    """Numbers of NumPy and whole numbers such as 1e4 are accepted."""
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=10)
    config.seed, config.learning_rate, config.max_steps = np.int64(3), np.float32(1e-3), 1e4
    config.__post_init__()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rat", 1, "did you mean learning_rate"),
        ("learning_rate", "abc", "must be a number, got 'abc'"),
        ("learning_rate", True, "must be a number"),
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("optim", "adamw_troch", "did you mean adamw_torch"),
        ("eval_strategy", "step", "did you mean steps"),
        ("report_to", 3, "must be text or a list, got 3"),
        (
            "lr_scheduler_kwargs",
            {"num_cycles": float("nan")},
            r"\.num_cycles must be a finite number",
        ),
        ("remove_unused_columns", True, "must stay False: "),
        ("template", "chat", r": use data\.template"),
        ("prompt_column", "q", r": use data\.prompt"),
        ("teacher_cache", "x", r": use teacher\.cache"),
        ("resume_from_checkpoint", "x", ": use --resume"),
        ("do_train", False, ": leave it out"),
        ("on_policy", 0.5, ": use lmbda"),
        ("seq_kd", True, r": use data\.responses=teacher"),
        ("lmbda", 1.5, "must be at most 1"),
    ],
)
def test_mistakes_in_a_recipe_are_explained(name, value, message):
    """An option in the wrong section and a word instead of a number are refused with an explanation."""
    with pytest.raises(UserError, match=rf"training\.{name}.*{message}"):
        in_recipe(**{name: value})


def test_dicts_are_read_from_a_command_line(tmp_path):
    """Scripts as those of TRL parse their arguments with HfArgumentParser, which knows no dicts."""
    words = ["--loss_options", '{"kd_weight": 0.3}', "--teacher_model_init_kwargs", '{"dtype": "float32"}']
    read = HfArgumentParser(DistillConfig).parse_args(words)
    given = {name: getattr(read, name) for name in ("loss_options", "model_init_kwargs", "teacher_model_init_kwargs")}
    args = DistillConfig(str(tmp_path), use_cpu=True, **given)
    assert (args.loss_options, args.model_init_kwargs) == ({"kd_weight": 0.3}, None)
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}
    for text, message in (("{", "loss_options is not valid JSON"), ("[1]", "loss_options must be a dict")):
        with pytest.raises(UserError, match=message):
            DistillConfig(str(tmp_path), use_cpu=True, loss_options=text)


def test_a_quantised_teacher_can_be_logged(tmp_path):
    """TensorBoard and other trackers write the arguments as JSON."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    args = DistillConfig(str(tmp_path), use_cpu=True, teacher_model_init_kwargs={"quantization_config": config})
    assert json.loads(args.to_json_string())["teacher_model_init_kwargs"]["quantization_config"]["quant_method"]
    assert args.teacher_model_init_kwargs["quantization_config"] is config


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "galore_adamw"},
        {"optim": "lomo"},
        {"bf16_full_eval": True},
        {"include_num_input_tokens_seen": "all"},
        {"optim_args": "eps=1", "optim": "adamw_torch"},
        {"load_best_model_at_end": True},
        {"dataloader_persistent_workers": True},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs"]},
        {"label_names": ["labels"]},
        {"optim_target_modules": "all-linear"},
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, options):
    """They would be ignored, or end in an exception of transformers after the models are loaded."""
    with pytest.raises(UserError, match=next(iter(options))):
        DistillConfig(str(tmp_path), use_cpu=True, **options)


def test_bfloat16_is_the_default_on_gpus_that_support_it(monkeypatch, tmp_path):
    """As in TRL, a training on a GPU is in mixed precision, and teachers are in bfloat16. A CPU has float32 as before."""
    sections = {"student": {"model": "x"}, "teacher": [{"model": "a"}, {"model": "b", "dtype": "float32"}]}

    def chosen(**training: Any) -> tuple[Any, ...]:
        recipe = recipe_from_dict({**sections, "data": {"train": "x"}, "training": training})
        args = DistillConfig(output_dir=str(tmp_path), **training)
        loaded = (loading_options(args, role)["dtype"] for role in ("", "teacher_"))
        return args.bf16, *(teacher.dtype for teacher in recipe.teachers), *loaded

    wide, narrow = torch.float32, torch.bfloat16
    assert chosen() == (False, "float32", "float32", wide, wide)
    for module in ("utils", "training_args"):
        monkeypatch.setattr(f"transformers.{module}.is_torch_bf16_gpu_available", lambda: True)
    assert chosen() == (True, "bfloat16", "float32", wide, narrow)
    assert chosen(bf16=False)[0] is chosen(fp16=True)[0] is False
    assert chosen(use_cpu=True) == (False, "float32", "float32", wide, wide)
