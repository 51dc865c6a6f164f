"""Test that unusable models are refused before training and others are accepted."""

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.errors import UserError
from dwakd.models import checks
from dwakd.models.checks import check_head, check_packing, check_training
from dwakd.models.head import output_head
from tests.builders import FAMILIES, tiny_model
from tests.models.architectures import small_model

VOCAB = 300


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2", "phi"])
def test_check_head_refuses_a_head_that_lacks_scale_cap_or_bias(family, monkeypatch):
    """A model is refused if its logits differ from those of its output head, as in an unknown architecture."""
    model = tiny_model(family, VOCAB)
    whole = output_head(model)
    bare = OutputHead(whole.weight)
    monkeypatch.setattr(checks, "output_head", lambda _: bare)
    with pytest.raises(UserError, match=r"largest difference \d"):
        check_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_refused_if_they_depend_on_each_other(family):
    """Position ids separate packed rows in most models. OPT numbers positions by its attention mask and is refused."""
    model = tiny_model(family, VOCAB)
    if not family.startswith("opt"):
        check_packing(model)
        return
    with pytest.raises(UserError, match=r"padding_free: with attention \w+, rows of .* depend on each other") as error:
        check_packing(model)
    assert "\n" not in str(error.value)


def test_check_head_names_the_model_and_leaves_every_mode_alone():
    """The message names the model, and the check restores the train or eval mode of every module."""
    model = tiny_model("llama", VOCAB)
    model.train()
    model.model.layers[0].eval()
    model.config._name_or_path = "some/model"
    hook = model.lm_head.register_forward_hook(lambda *arguments: arguments[-1] + 1)
    with pytest.raises(UserError, match="some/model"):
        check_head(model)
    hook.remove()
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_check_head_runs_without_dropout():
    """The check runs without dropout, with which two forward passes would differ."""
    model = tiny_model("gpt2", VOCAB, resid_pdrop=0.5, embd_pdrop=0.5)
    check_head(model.train())


def test_bfloat16_models_pass_the_check():
    """The rounding of bfloat16 is accepted."""
    check_head(tiny_model("gemma2", VOCAB).to(torch.bfloat16))


def changed_output(module, change):
    """Apply `change` to the output of a module, or to its first element if the output is a tuple."""
    module.register_forward_hook(
        lambda _, __, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
    )


def lookahead(states):
    return states + 0.05 * states.roll(-1, dims=1)


def bidirectional_prefix(states):
    return torch.cat([states[:, :3] + 0.05 * states[:, :3].mean(1, keepdim=True), states[:, 3:]], dim=1)


def pairs(states):
    """Let each token read the other token of its pair."""
    chunks = states.unflatten(1, (-1, 2))
    return (chunks + 0.05 * chunks.flip(2)).view_as(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [lookahead, bidirectional_prefix, pairs, lambda states: states + states.mean(1, True)]
)
def test_a_model_that_reads_later_tokens_is_refused(change, dtype):
    """A model is refused if its hidden states depend on later tokens, which are those to predict."""
    model = tiny_model("llama", VOCAB).to(dtype)
    changed_output(model.model.layers[0], change)
    with pytest.raises(UserError, match="LlamaForCausalLM is not causal"):
        check_head(model)


@pytest.mark.parametrize("model_type", ["cpmant", "xlnet", "reformer"])
def test_architectures_that_read_later_tokens_are_refused(model_type):
    """Bidirectional architectures are refused, although no setting of their config says that they are."""
    with pytest.raises(UserError, match="is not causal"):
        check_head(small_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"is_causal": False}),
        ("bert-generation", {"is_decoder": False}),
        ("xlm", {"causal": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("t5", {}),
        ("bart", {}),
    ],
)
def test_a_model_that_is_not_made_a_decoder_is_refused(model_type, options):
    """Architectures whose settings make them bidirectional are refused, and so are encoder-decoders such as BART."""
    with pytest.raises(UserError, match="is not causal"):
        check_head(small_model(model_type, whole=True, **options))


def test_a_model_that_mixes_the_sequences_of_a_batch_is_refused():
    """A model is refused if its hidden states depend on other sequences of the batch."""
    model = tiny_model("llama", VOCAB)
    changed_output(model.model.layers[0], lambda states: states + 0.05 * states.mean(0, keepdim=True))
    with pytest.raises(UserError, match="other sequences of a batch"):
        check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["mixtral", "mamba2", "rwkv", "zamba2", "lfm2", "gpt_oss"])
def test_experts_windows_and_states_pass_the_check(model_type, dtype):
    """Mixtures of experts, whose rounding depends on other tokens, sliding windows and state-space models are accepted."""
    check_head(small_model(model_type).to(dtype))


def test_the_check_of_a_model_leaves_the_random_state_alone():
    """The check does not change the random state, which determines the order of the training rows."""
    state = torch.get_rng_state()
    check_head(tiny_model("llama", VOCAB).train())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_head_that_forbids_its_padding_rows_is_compared_by_the_others(bias):
    """Infinite or very large logits of forbidden tokens neither cause NaN nor hide other differences."""
    model = tiny_model("phi", VOCAB + 8)
    with torch.no_grad():
        model.lm_head.bias[VOCAB:] = bias
    check_head(model)
    changed_output(model.lm_head, lambda logits: logits + 0.1)
    with pytest.raises(UserError, match="largest difference"):
        check_head(model)


def half_body():
    model = tiny_model("llama", VOCAB).to(torch.bfloat16)
    model.lm_head.float()
    return model


def image_model():
    model = tiny_model("llama", VOCAB)
    model.forward = lambda input_ids, attention_mask, pixel_values, **_: None
    return model


def no_numbers():
    model = tiny_model("llama", VOCAB)
    model.model.norm.weight.data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (half_body, "forward pass"),
        (image_model, "pixel_values"),
        (no_numbers, "NaN"),
        (lambda: tiny_model("llama", VOCAB).to("meta"), "meta device"),
        (lambda: tiny_model("llama", VOCAB).model, "output head"),
        (lambda: torch.nn.Linear(2, 2), "input embeddings"),
        (lambda: small_model("musicgen"), "input embeddings"),
        (lambda: small_model("xmod"), "language"),
    ],
)
def test_a_model_that_cannot_run_is_refused_in_one_sentence(make, reason):
    """The error names the model and the fix, and is raised before the data is prepared."""
    model = make()
    with pytest.raises(UserError, match=reason) as caught:
        check_head(model)
    assert type(model).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", [1, 2, 5])
def test_models_of_few_positions_are_checked_within_them(positions):
    """The check uses no more positions than the model has."""
    check_head(tiny_model("gpt2", VOCAB, n_positions=positions))


ROUTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "jetmoe", "dbrx", "gpt_oss", "jamba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ROUTED)
def test_a_router_balancing_loss_is_refused(model_type, dtype):
    """A student with a router-balancing loss is refused, because distillation would ignore this loss."""
    model = small_model(model_type).to(dtype)
    check_training(model, gradient_checkpointing=False)
    model.config.output_router_logits = True
    check_head(model)  # accepted for a teacher
    with pytest.raises(UserError, match=r"ForCausalLM.*output_router_logits=false"):
        check_training(model, gradient_checkpointing=False)


def test_a_router_balancing_loss_of_a_composite_model_is_refused():
    """The setting of a composite model is read from its text config."""
    model = small_model("qwen3_5_moe")
    model.config.get_text_config().output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits=false"):
        check_training(model, gradient_checkpointing=False)


def test_router_logits_without_a_loss_are_accepted():
    """A router without a balancing loss, or with one of weight 0, is accepted."""
    model = small_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)
    check_training(model, gradient_checkpointing=False)
    check_training(small_model("deepseek_v3", output_router_logits=True), gradient_checkpointing=False)


def test_other_losses_of_a_model_are_refused():
    """Other losses are refused, such as Bamba's z-loss or one of a subclass."""
    with pytest.raises(UserError, match="z_loss_coefficient=0"):
        check_training(small_model("bamba", z_loss_coefficient=1e-3), gradient_checkpointing=False)
    model = tiny_model("llama")
    plain = model.loss_function
    model.loss_function = lambda *arguments, **options: 1.001 * plain(*arguments, **options)
    with pytest.raises(UserError, match="LlamaForCausalLM adds a loss"):
        check_training(model, gradient_checkpointing=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_are_accepted(family):
    """Ordinary models are accepted, also those with scaled or capped logits."""
    check_training(tiny_model(family), gradient_checkpointing=True)


@pytest.mark.parametrize("model_type", ["xlm", "git", "openai-gpt"])
def test_models_whose_own_loss_is_unusual_are_accepted(model_type):
    """Models are accepted if their own loss cannot be compared: XLM's does not shift the labels, and GIT's needs an image."""
    check_training(small_model(model_type), gradient_checkpointing=False)


@pytest.mark.parametrize("model_type", ["ctrl", "openai-gpt", "xlm", "jetmoe"])
def test_gradient_checkpointing_that_a_model_lacks_is_refused(model_type):
    """A model without gradient checkpointing is refused if the option is set, before the data is prepared."""
    model = small_model(model_type)
    check_training(model, gradient_checkpointing=False)
    with pytest.raises(UserError, match=rf"{type(model).__name__}.*gradient_checkpointing=false"):
        check_training(model, gradient_checkpointing=True)
