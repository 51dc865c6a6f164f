"""Build small models of every causal class of transformers from a table of config fields and special cases."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCAB = 400

MODEL_TYPES = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "backbone_hidden_size", "hidden_size_per_layer_input"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads", "index_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_query_groups"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "d_inner"), 48),
    **dict.fromkeys(("feed_forward_size", "dim_ff", "ffn_hidden_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 512),
    **dict.fromkeys(("max_target_positions",), 512),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head", "swa_head_dim", "attention_head_size", "d_head"), 8),
    **dict.fromkeys(("v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_headdim", "mamba_head_dim", "d_rel"), 8),
    **dict.fromkeys(("qk_head_dim", "attention_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "o_groups"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "attention_chunk_size", "local_attention"), 16),
    **dict.fromkeys(("router_hidden_size", "hc_lowrank", "gated_norm_rank", "laurel_rank", "adapter_rank"), 16),
    **dict.fromkeys(("is_decoder",), True),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
"""Config fields of many architectures with their small values."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention does not group heads
_SHARED_BLOCKS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
}

_RECIPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_embed_dim": 32, "shape_vocab_size": 100},
    "xlm": {"causal": True},
    "zamba": {**_SHARED_BLOCKS, "attention_head_dim": 16},
    "zamba2": _SHARED_BLOCKS,
    "zaya": {"num_experts_per_tok": 1},
}
"""Additional config fields of single architectures."""


def small_config(model_type: str, **options: Any) -> PretrainedConfig:
    """Return the config of a model with a few thousand parameters. `options` are set in the config unchanged."""
    return _shrunk(CONFIG_MAPPING[model_type](), {**_RECIPES.get(model_type, {}), **options})


def small_model(model_type: str, *, whole: bool = False, **options: Any) -> Any:
    """Return a random model in eval mode, with every parameter changed from its initial value.

    Args:
        model_type: model type of transformers.
        whole: build the encoder-decoder of this model type instead of its causal class.
        options: fields of the config.
    """
    names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if whole else {}
    model_class = getattr(transformers, {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **names}[model_type])
    config = small_config(model_type, **options)
    if not isinstance(config, model_class.config_class):  # the decoder of a composite model
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = model_class._from_config(config).num_parameters()
    if size > 3_000_000:
        raise ValueError(f"{model_type} is not small: {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class._from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _shrunk(default: PretrainedConfig, recipe: dict[str, Any]) -> PretrainedConfig:
    """Return a config of the class of `default`, and of its parts, with the small values of the table and of a recipe."""
    parts = {name: getattr(default, name) for name in default.sub_configs}
    known = {*default.to_dict(), *default.attribute_map} - {*parts}
    options = {name: value for name, value in _SMALL.items() if name in known}
    own = {name: value for name, value in recipe.items() if name not in parts}
    sub = {
        name: {**_shrunk(part, recipe.get(name, {})).to_dict(), **recipe.get(name, {})}
        for name, part in parts.items()
        if isinstance(part, PretrainedConfig)
    }
    return type(default)(**{**options, **own, **sub})
