"""What is saved is what was trained, and what is loaded is what was saved."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dwakd import UserError, load_causal_lm
from dwakd.models.saving import save_causal_lm
from dwakd.training.checkpoint import load_student
from dwakd.training.evaluation import plain_metrics
from tests.builders import byte_bpe, tiny_model
from tests.training.builders import ROWS, trainer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(30).view(2, 15)).logits


def adapted(base, name: str):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"), name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_an_adapter_of_any_name_is_restored(tmp_path):
    """PEFT saves an adapter that is not called "default" in a subfolder, where nothing looks for it."""
    tiny_model("llama", 400).save_pretrained(tmp_path / "base")
    byte_bpe().save_pretrained(tmp_path / "base")
    student = adapted(tmp_path / "base", "colours")
    save_causal_lm(student, tmp_path / "out")
    assert not (tmp_path / "out" / "colours").exists()
    again = get_peft_model(tiny_model("llama", 400), LoraConfig(r=2, task_type="CAUSAL_LM"), "shapes")
    load_student(again, tmp_path / "out")
    assert torch.equal(logits(again), logits(student))
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "out"))), logits(student), atol=1e-4, rtol=1e-3)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(plain), logits(student))


def test_each_parameter_keeps_its_own_dtype(tmp_path):
    """A float32 head on a bfloat16 body would be rounded whenever a checkpoint is loaded."""
    student = tiny_model("llama").to(torch.bfloat16)
    student.model.norm.float()
    student.lm_head.float()
    torch.nn.init.normal_(student.lm_head.weight, generator=torch.Generator().manual_seed(1))
    saved = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    save_causal_lm(student, tmp_path)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    load_student(student, tmp_path)
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize(
    "value", [0.5, np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.array(0.5), torch.tensor(0.5)]
)
def test_metrics_of_users_become_plain_numbers(value):
    """transformers.Trainer takes numbers of numpy and torch; JSON does not, so the first checkpoint would fail."""
    plain = plain_metrics({"score": value})
    assert json.loads(json.dumps(plain))["score"] == float(value)


@pytest.mark.parametrize(
    "metrics", [{"f1": np.array([0.1, 0.2])}, {"f1": object()}, {1: 0.5}, [("f1", 0.5)], 0.5, None]
)
def test_metrics_that_are_no_numbers_are_named(metrics):
    """Found before the first checkpoint, with the metric's name, instead of a TypeError of JSON."""
    with pytest.raises(UserError, match=r"compute_metrics.*(f1|1|list|float|None)"):
        plain_metrics(metrics)


def test_metrics_that_the_best_model_needs_are_checked(tmp_path):
    """A metric that is missing or overwrites a term would end a run at its first evaluation, or choose wrongly."""
    options = {"method": "sft", "eval_rows": ROWS[:2], "eval_max_new_tokens": 2, "metric_for_best_model": "f1"}
    with pytest.raises(UserError, match="metric_for_best_model f1"):
        trainer(tmp_path, **options)
    run = trainer(tmp_path, **{**options, "metric_for_best_model": None})
    run.args.metric_for_best_model = "f1"
    for metrics, named in (({"f1": None}, "f1"), ({"f1": float("nan")}, "nan"), ({"ce": 0.1}, "ce"), ({"em": 1}, "f1")):
        run.metrics_function = lambda prediction, metrics=metrics: metrics
        with pytest.raises(UserError, match=named):
            run.evaluate()


def test_the_tokenizer_and_weights_survive_settings_that_json_cannot_hold(tmp_path):
    """A callback can put anything into the generation settings."""
    run = trainer(tmp_path, method="sft", max_steps=1)
    run.student.generation_config.own = object()
    run.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


def test_metrics_are_logged_as_numbers(tmp_path):
    """The whole way: evaluation, checkpoint and the saved state."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, method="sft", max_steps=1, eval_rows=ROWS[:2], eval_max_new_tokens=3, **options)
    run.metrics_function = lambda prediction: {"score": np.float32(0.5)}
    run.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert [entry["eval_score"] for entry in state["log_history"] if "eval_score" in entry] == [0.5]
