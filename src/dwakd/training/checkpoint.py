"""Reading a student back into a model that is already there."""

from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM


def load_student(student: nn.Module, folder: str | Path) -> None:
    """Load the weights (or the adapter) that `save_pretrained` left in a folder, in place."""
    if isinstance(student, PeftModel):
        set_peft_model_state_dict(student, load_peft_weights(str(folder), device="cpu"))
        return
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=next(student.parameters()).dtype)
    student.load_state_dict(saved.state_dict())
