"""Test that weights are always saved and that settings without effect are reset."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dwakd.errors import UserError
from dwakd.models.saving import remove_unused_sampling, save_causal_lm
from tests.builders import tiny_model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(30).view(2, 15)).logits


def test_settings_never_cost_the_weights(tmp_path, caplog):
    """An invalid setting, for example from a callback, must not prevent the weights from being saved."""
    student = tiny_model("llama")
    student.generation_config.max_new_tokens = -1
    with caplog.at_level(logging.WARNING):
        save_causal_lm(student, tmp_path / "a")
    assert "without its generation settings" in caplog.text
    assert student.generation_config.max_new_tokens == -1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), logits(student))
    student.config.temperature = 0.3
    with pytest.raises(UserError, match=r"temperature.*model\.safetensors"):
        save_causal_lm(student, tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")["lm_head.weight"], student.lm_head.weight)


def test_unused_sampling_settings_are_reset_with_a_warning(tmp_path, caplog):
    """Qwen's models come with a temperature but without do_sample, and transformers refuses to save that."""
    student = tiny_model("llama")
    student.generation_config.temperature = 0.7
    student.generation_config.top_k = 20
    with caplog.at_level(logging.WARNING):
        save_causal_lm(student, tmp_path)
    assert "reset temperature, top_k" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature in (None, 1.0)
    student.generation_config.do_sample = True
    student.generation_config.temperature = 0.7
    remove_unused_sampling(student)
    assert student.generation_config.temperature == 0.7


def test_an_adapter_is_saved_in_the_folder_itself(tmp_path):
    """An adapter that is not named "default" is saved in the folder itself, where loading finds it."""
    for name in ("default", "colours"):
        student = get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"), name)
        save_causal_lm(student, tmp_path / name)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / name).iterdir()}
        assert not [path for path in (tmp_path / name).iterdir() if path.is_dir()]
