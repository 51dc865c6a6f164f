"""Build runs of a few steps on tiny models."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dwakd import DistillConfig, DistillTrainer
from dwakd.losses import method_options
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model

NOUNS = ["door", "cat", "sea", "sky", "tree", "house", "boat", "lamp"]
NOUNS += ["road", "hill", "shoe", "bird", "ring", "book", "wall", "moon"]
COLOURS = ["red", "black", "blue", "grey", "green", "white", "brown", "warm"]
COLOURS += ["long", "steep", "old", "quick", "gold", "thin", "pale", "bright"]
ROWS = [
    {"prompt": f"Name a colour that goes with {noun}.", "response": f"A {colour} {noun} é😀"}
    for noun, colour in zip(NOUNS, COLOURS, strict=True)
]
TOKENIZERS = byte_bpe(), bpe_byte_fallback()  # not Unigram, whose training is not deterministic


def trainer(output: Path, *, rows: list[dict[str, Any]] = ROWS, lora: bool = False, **options: Any) -> DistillTrainer:
    """Return a trainer with a Llama-like student and a Gemma-like teacher with another tokenizer."""
    student_tokenizer, teacher_tokenizer = TOKENIZERS
    needs = method_options(options.get("method", "dwa_kd"), options.get("loss_options"))
    two_tokenizers = options.pop("two_tokenizers", not needs.needs_same_vocabulary)
    if not two_tokenizers:
        teacher_tokenizer = student_tokenizer
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "template": "plain",
        "use_cpu": True,
        "seed": 3,
    }
    eval_rows, tokenizers = options.pop("eval_rows", None), options.pop("teacher_tokenizers", teacher_tokenizer)
    return DistillTrainer(
        model=tiny_model(options.pop("student", "llama"), len(student_tokenizer), seed=1),
        teacher_model=options.pop("teacher_model", None)
        or tiny_model(options.pop("teacher", "gemma2"), len(teacher_tokenizer), seed=2),
        args=DistillConfig(output_dir=str(output), **{**arguments, **options}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=student_tokenizer,
        teacher_processing_class=tokenizers,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM") if lora else None,
    )


def on_policy(lmbda: float) -> dict[str, Any]:
    """Options of a run in which the student answers this share of the prompts."""
    return {"lmbda": lmbda, "max_new_tokens": 9, "max_length": 64, "max_prompt_length": 40, "term_gradient_steps": 2}


def weights(run: DistillTrainer) -> dict[str, torch.Tensor]:
    """Return a copy of everything that training changes."""
    return {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    """Assert that two sets of weights are equal, by name."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=atol, rtol=0, msg=f"{name}: {{}}".format)
