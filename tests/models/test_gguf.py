"""GGUF: converted once, exactly, into a folder that behaves like any other."""

import importlib.util
import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd.errors import UserError
from dwakd.models import gguf as conversion
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.paths import CACHE_VARIABLE
from tests.builders import CHAT_TEMPLATE, SAMPLE_TEXTS, byte_bpe, tiny_model

HEADS, KEY_HEADS = 4, 2


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rotary dimensions of query and key."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, *, architecture="llama", skip=()):
    """A real GGUF file of a Llama and a GPT-2 kind of tokenizer, float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KEY_HEADS)
        target = names.get_name(name, try_suffixes=(".weight",))
        if target not in skip:
            writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tokenizer():
    return byte_bpe()


@pytest.fixture
def model(tokenizer):
    return tiny_model("llama", len(tokenizer))


def test_conversion_keeps_logits_and_text(tmp_path, model, tokenizer):
    """A lost permutation or norm would make a teacher that talks nonsense."""
    spec = f"gguf:{write_gguf(tmp_path / 'tiny.gguf', model, tokenizer)}"
    loaded, read = load_causal_lm(spec), load_tokenizer(spec)
    input_ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert not hasattr(loaded.config, "quantization_config")
    for text in [*SAMPLE_TEXTS, "", " ", "\n\n  x\t", "unseen ζ \u200d 🙃"]:
        ids = read(text, add_special_tokens=False).input_ids
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert read.decode(ids) == text
    assert read.eos_token == read.pad_token == "<|endoftext|>"
    assert read.chat_template == CHAT_TEMPLATE


def test_the_folder_is_a_plain_checkpoint_that_can_be_saved_again(tmp_path, cache, model, tokenizer):
    """transformers' own GGUF model refuses save_pretrained: a student made of it could never be kept."""
    spec = f"gguf:{write_gguf(tmp_path / 'tiny.gguf', model, tokenizer)}"
    load_causal_lm(spec).save_pretrained(tmp_path / "again")
    (folder,) = cache.iterdir()
    for place in (folder, tmp_path / "again"):
        assert (place / "model.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(place)
    AutoTokenizer.from_pretrained(folder)


def test_converted_once_and_again_when_the_content_changes(tmp_path, cache, model, tokenizer, monkeypatch):
    """Half a minute on every start; and a stale folder would be another model than the file."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    first = conversion.convert_gguf(path)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted twice"))
        assert conversion.convert_gguf(path) == first
    path.unlink()
    write_gguf(path, tiny_model("llama", len(tokenizer), seed=1), tokenizer)
    assert conversion.convert_gguf(path) != first


def test_without_the_package_the_error_names_the_extra(tmp_path, cache, model, tokenizer, monkeypatch):
    """transformers' own message asks for torch, and does not say how to get the reader with dwakd."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(UserError, match=r"tiny\.gguf .*dwakd\[gguf\]"):
        conversion.convert_gguf(path)
    assert list(cache.iterdir()) == []


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, cache, model, tokenizer, monkeypatch):
    """A half-written folder would be taken for the model by the next run."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)

    def broken(_, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert_gguf(path)
    assert list(cache.iterdir()) == []


def test_a_second_process_that_converts_at_once_wins_or_loses_quietly(tmp_path, cache, model, tokenizer, monkeypatch):
    """Two ranks start together."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    convert = conversion._convert

    def raced(source, folder):
        convert(source, folder)
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "_convert", convert)
            conversion.convert_gguf(path)

    monkeypatch.setattr(conversion, "_convert", raced)
    folder = conversion.convert_gguf(path)
    assert list(cache.iterdir()) == [folder]


def test_each_bad_file_gets_one_sentence(tmp_path, cache, model, tokenizer):
    """Bad input ends with a sentence, not with a traceback out of a binary reader."""
    with pytest.raises(UserError, match=r"none\.gguf"):
        load_causal_lm(f"gguf:{tmp_path}/none.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(UserError, match=r"text\.gguf .*GGUF file"):
        load_causal_lm(f"gguf:{tmp_path}/text.gguf")
    whole = write_gguf(tmp_path / "tiny.gguf", model, tokenizer).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        load_causal_lm(f"gguf:{tmp_path}/cut.gguf")
    write_gguf(tmp_path / "odd.gguf", model, tokenizer, architecture="rwkv6")
    with pytest.raises(UserError, match="rwkv6"):
        load_causal_lm(f"gguf:{tmp_path}/odd.gguf")
    write_gguf(tmp_path / "part.gguf", model, tokenizer, skip=("blk.1.ffn_up.weight",))
    with pytest.raises(UserError, match=r"part\.gguf .*1 .*up_proj"):
        load_causal_lm(f"gguf:{tmp_path}/part.gguf")
    assert list(cache.iterdir()) == []
