"""A student whose config asks for something that distillation does not do is refused."""

import pytest
import torch

from dwakd.errors import UserError
from dwakd.models.rows import check_head
from dwakd.models.trainable import check_training
from tests.builders import FAMILIES, tiny_model
from tests.models.architectures import small_model

ROUTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "jetmoe", "dbrx", "gpt_oss", "jamba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ROUTED)
def test_a_router_balancing_loss_is_refused(model_type, dtype):
    """Distillation would ignore the balancing loss, and the routers would choose few experts."""
    model = small_model(model_type).to(dtype)
    check_training(model, gradient_checkpointing=False)
    model.config.output_router_logits = True
    check_head(model)  # a teacher's is of no matter
    with pytest.raises(UserError, match=r"ForCausalLM.*output_router_logits=false"):
        check_training(model, gradient_checkpointing=False)


def test_a_router_balancing_loss_of_a_composite_model_is_refused():
    """The setting of a composite model is that of its text config."""
    model = small_model("qwen3_5_moe")
    model.config.get_text_config().output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits=false"):
        check_training(model, gradient_checkpointing=False)


def test_router_logits_without_a_loss_are_accepted():
    """A coefficient of 0 adds no loss, and DeepSeek's router has none."""
    model = small_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)
    check_training(model, gradient_checkpointing=False)
    check_training(small_model("deepseek_v3", output_router_logits=True), gradient_checkpointing=False)


def test_other_losses_of_a_model_are_refused():
    """Bamba's z-loss has its own setting, and a subclass may add any loss."""
    with pytest.raises(UserError, match="z_loss_coefficient=0"):
        check_training(small_model("bamba", z_loss_coefficient=1e-3), gradient_checkpointing=False)
    model = tiny_model("llama")
    plain = model.loss_function
    model.loss_function = lambda *arguments, **options: 1.001 * plain(*arguments, **options)
    with pytest.raises(UserError, match="LlamaForCausalLM adds a loss"):
        check_training(model, gradient_checkpointing=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_models_are_accepted(family):
    """Scaled or capped logits do not add a loss."""
    check_training(tiny_model(family), gradient_checkpointing=True)


@pytest.mark.parametrize("model_type", ["xlm", "git", "openai-gpt"])
def test_models_whose_own_loss_is_unusual_are_accepted(model_type):
    """XLM compares tokens of the same position, and GIT's own loss needs an image; neither is used here."""
    check_training(small_model(model_type), gradient_checkpointing=False)


@pytest.mark.parametrize("model_type", ["ctrl", "openai-gpt", "xlm", "jetmoe"])
def test_gradient_checkpointing_that_a_model_lacks_is_refused(model_type):
    """transformers raises when the first step begins, after models and data were prepared."""
    model = small_model(model_type)
    check_training(model, gradient_checkpointing=False)
    with pytest.raises(UserError, match=rf"{type(model).__name__}.*gradient_checkpointing=false"):
        check_training(model, gradient_checkpointing=True)
