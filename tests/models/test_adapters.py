"""Test that a merged model gives the logits of the model with its adapter, also after it was saved and loaded."""

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from dwakd.errors import UserError
from dwakd.models.adapters import merge_adapter
from dwakd.models.loading import load_causal_lm, quiet_peft
from tests.builders import tiny_model
from tests.models.architectures import small_model

IDS = torch.arange(2, 42).view(2, 20)


def lora(*targets, **options):
    return LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **options)


def adapted(model, config):
    """Add an adapter with random weights to the model."""
    with quiet_peft(), torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return wrapped.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied and untied
@pytest.mark.parametrize(
    "config",
    [
        lora("q_proj", "lm_head"),
        lora("embed_tokens"),
        lora("lm_head", "embed_tokens"),
        lora("lm_head", use_dora=True),
        lora("lm_head", use_rslora=True, ensure_weight_tying=True),
        lora("embed_tokens", modules_to_save=["lm_head"]),
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("q_proj", modules_to_save=["lm_head", "embed_tokens"]),
        lora("q_proj", trainable_token_indices=[3, 299]),
        lora("q_proj", trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}),
        TrainableTokensConfig(token_indices=[3, 299], target_modules=["lm_head"]),
        IA3Config(target_modules=["lm_head", "k_proj"], feedforward_modules=[]),
        LoHaConfig(r=4, target_modules=["lm_head"]),
        LoKrConfig(r=4, target_modules=["lm_head"]),
        OFTConfig(oft_block_size=8, target_modules=["lm_head"]),
        VeraConfig(r=4, target_modules=["lm_head"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_of_vocabulary_matrices_merge_and_survive_saving(family, config, tmp_path):
    """Adapters on head or embeddings are merged correctly, also if both share one matrix."""
    model = adapted(tiny_model(family), config)
    expected = logits(model)
    merged = merge_adapter(model, "some/adapter")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path))), expected, atol=1e-4, rtol=1e-4)


def test_a_tied_model_stays_tied_if_its_matrix_is_not_adapted():
    """A tied model stays tied if the adapter does not change the shared matrix."""
    merged = merge_adapter(adapted(tiny_model("qwen2"), lora("q_proj")), "some/adapter")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def one_matrix(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def one_module(model):
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def one_block(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


@pytest.mark.parametrize("share", [one_matrix, one_module, one_block])
@pytest.mark.parametrize("config", [lora("up_proj"), lora("q_proj"), lora("q_proj", modules_to_save=["up_proj"])])
def test_layers_that_share_weights_give_the_same_logits_or_are_refused(share, config):
    """Layers that share a weight are merged without changing the logits, or refused."""
    model = tiny_model("llama")
    share(model)
    model = adapted(model, config)
    expected = logits(model)
    if "up_proj" in config.target_modules and share is not one_block:
        with pytest.raises(UserError, match=r"some/adapter .*layers\.0\.mlp\.up_proj.*layers\.1\.mlp\.up_proj"):
            merge_adapter(model, "some/adapter")
    else:
        torch.testing.assert_close(logits(merge_adapter(model, "some/adapter")), expected, atol=1e-4, rtol=1e-4)


def test_shared_blocks_of_an_architecture_are_refused():
    """Zamba 2, which uses one block at several depths with an adapter for each, is refused."""
    with pytest.raises(UserError, match=r"some/adapter .*shared_transformer"):
        merge_adapter(adapted(small_model("zamba2"), lora("q_proj")), "some/adapter")


def test_an_adapter_on_a_shared_norm_is_refused():
    """An adapter on a norm is refused if another norm shares its weight."""
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight = model.model.norm.weight
    config = LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"model\.norm"):
        merge_adapter(adapted(model, config), "some/adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_rounding_of_half_precision_passes(dtype, use_dora):
    """The rounding of merged half-precision weights is accepted."""
    model = adapted(tiny_model("llama", num_hidden_layers=8).to(dtype), lora("q_proj", "up_proj", use_dora=use_dora))
    assert merge_adapter(model, "some/adapter").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_changes_the_logits_is_refused(dtype, monkeypatch):
    """A merge that changes the logits is refused, for any type of adapter."""
    model = adapted(tiny_model("llama").to(dtype), lora("q_proj"))
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda tuner: tuner.unload())
    with pytest.raises(UserError, match=r"some/adapter .*self_attn\.q_proj"):
        merge_adapter(model, "some/adapter")


def test_rows_of_trained_tokens_are_compared(monkeypatch):
    """The comparison uses tokens whose embeddings the adapter has trained, which random tokens rarely include."""
    model = adapted(
        tiny_model("llama", 5000), TrainableTokensConfig(token_indices=[4321], target_modules=["embed_tokens"])
    )
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda tuner: tuner.unload())
    with pytest.raises(UserError, match="embed_tokens"):
        merge_adapter(model, "some/adapter")


def test_learned_prompts_are_refused():
    """Learned prompts are refused, because they change no weights that could be merged."""
    with pytest.raises(UserError, match=r"some/adapter .*PROMPT_TUNING"):
        merge_adapter(
            get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
            "some/adapter",
        )


def test_forbidden_tokens_hide_no_difference(monkeypatch):
    """A bias of -inf or a very large one does not hide a difference of the logits."""
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[290:] = -torch.inf
        model.lm_head.bias[280:290] = torch.finfo(torch.float32).min
    model = adapted(model, lora("q_proj"))
    merge_adapter(model, "some/adapter")
    model = adapted(model.get_base_model(), lora("q_proj"))
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda tuner: tuner.unload())
    with pytest.raises(UserError, match="some/adapter"):
        merge_adapter(model, "some/adapter")
