"""Build tiny models and tokenizers in memory, without files or network, in a few milliseconds each."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SAMPLE_TEXTS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "Which is larger, 12 or 7? The larger number is 12.",
    "Name three colours.\nRed, green and blue.\n\n  Two spaces lead here.",
    "Ça va bien, merci. Über den Fluss führt eine Brücke.",
    "你好，世界。今天天气很好。",
    "Привет, мир! Как дела сегодня?",
    "Emoji 😀👩‍👩‍👧 and combining e\u0301 a\u0308 marks.",
    "def add(a, b):\n    return a + b\n",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
_GROUPED = {**_WIDTHS, "num_key_value_heads": 2}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (GPT2Config, _GPT2),
    "llama": (LlamaConfig, {**_GROUPED, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {**_GROUPED, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {**_GROUPED, "head_dim": 8, "sliding_window": 16}),
    "opt": (OPTConfig, _OPT),
    "opt_projected": (OPTConfig, {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": 16}),
    "gpt_neox": (GPTNeoXConfig, _WIDTHS),
    "phi": (PhiConfig, _WIDTHS),
    "cohere": (CohereConfig, {**_GROUPED, "logit_scale": 0.25}),
    "granite": (GraniteConfig, {**_GROUPED, "logits_scaling": 4.0}),
}


def tiny_model(family: str, vocab_size: int = 300, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random causal language model with a few thousand parameters, in eval mode and without dropout.

    All parameters are random, biases and norms included, so that a test fails if one is ignored. `overrides` are set in
    the config under the names of the model family. Special tokens: eos 1, pad 0.
    """
    config_class, options = FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = config_class(**{**options, **special, "vocab_size": vocab_size, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.5 if "embed_tokens" in name or "wte" in name or "embed_in" in name else 0.2
                base = parameter if parameter.dim() == 1 else torch.zeros_like(parameter)
                parameter.copy_(base + spread * torch.randn_like(parameter))
    return model.eval()


def byte_bpe(
    texts: Sequence[str] = SAMPLE_TEXTS, vocab_size: int = 400, *, eos: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer like GPT-2's: lossless byte-level BPE. Token 0 is eos, bos and pad."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, bos_token=eos, eos_token=eos, pad_token=eos)


def unigram_byte_fallback(
    texts: Sequence[str] = SAMPLE_TEXTS, vocab_size: int = 400, *, prefix_space: bool = True
) -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's and Gemma's: SentencePiece Unigram with `▁` for space and pieces for all bytes.

    `<unk>` is 0, `<s>` 1, `</s>` 2 (also pad), the bytes `<0x00>` to `<0xFF>` are 3 to 258. Without `prefix_space`, no
    `▁` is written before the text (Gemma).
    """
    tokenizer = Tokenizer(Unigram())
    _sentencepiece(tokenizer, prefix_space)
    _split_words(tokenizer)
    trainer = trainers.UnigramTrainer(
        vocab_size=max(vocab_size - 259, 40), unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = _unigram_pieces(tokenizer)
    head = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    tokenizer = Tokenizer(Unigram(vocab=head + pieces, unk_id=0, byte_fallback=True))
    _sentencepiece(tokenizer, prefix_space)
    return _wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def bpe_byte_fallback(
    texts: Sequence[str] = SAMPLE_TEXTS, vocab_size: int = 400, *, prefix_space: bool = True
) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's and Mistral's: SentencePiece BPE with `▁` for space and byte pieces.

    The special tokens and bytes have the same ids as in `unigram_byte_fallback`.
    """
    specials = ["<unk>", "<s>", "</s>"]
    head = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE())
    _sentencepiece(tokenizer, prefix_space)
    _split_words(tokenizer)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=head, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = BPE(
        vocab=tokenizer.get_vocab(),
        merges=_merges(tokenizer),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    _sentencepiece(tokenizer, prefix_space)
    return _wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def wordpiece(texts: Sequence[str] = SAMPLE_TEXTS, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Return a tokenizer like cased BERT's: white space is lost, and characters that are not in `texts` become `[UNK]`.

    `[PAD]` is 0, `[UNK]` 1, `[EOS]` 2 (also bos).
    """
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[EOS]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, unk_token="[UNK]", bos_token="[EOS]", eos_token="[EOS]", pad_token="[PAD]")


def _wrapped(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **special_tokens)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _sentencepiece(tokenizer: Tokenizer, prefix_space: bool) -> None:
    """Use Llama's layout: no pre-tokeniser, and a normaliser that writes spaces as `▁`."""
    steps = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backwards = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(backwards + ([decoders.Strip(" ", 1, 0)] if prefix_space else []))


def _split_words(tokenizer: Tokenizer) -> None:
    """Add a pre-tokeniser for the training only. Without it, tokens would cross word boundaries."""
    words = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex("▁+"), "merged_with_next")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)


def _unigram_pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocab if piece != "<unk>"]


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
