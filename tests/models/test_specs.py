"""Test that specs are resolved or refused in one sentence, and that a GGUF file is converted exactly and only once."""

import importlib
import importlib.util
import json

import gguf
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd.errors import UserError
from dwakd.folders import CACHE_VARIABLE
from dwakd.models import specs
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.saving import save_causal_lm
from dwakd.models.specs import convert_gguf
from tests.builders import CHAT_TEMPLATE, SAMPLE_TEXTS, byte_bpe, tiny_model

HEADS, KEY_HEADS = 4, 2


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rotary dimensions of query and key as llama.cpp does."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, *, architecture="llama", skip=()):
    """Write a float32 GGUF file of a Llama model and a byte-level BPE tokenizer."""
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
    """The converted model gives the same logits, and the tokenizer the same tokens, as the original."""
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
    """The converted model can be saved again, unlike a model that transformers reads from a GGUF file."""
    spec = f"gguf:{write_gguf(tmp_path / 'tiny.gguf', model, tokenizer)}"
    load_causal_lm(spec).save_pretrained(tmp_path / "again")
    (folder,) = cache.iterdir()
    for place in (folder, tmp_path / "again"):
        assert (place / "model.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(place)
    AutoTokenizer.from_pretrained(folder)


def test_converted_once_and_again_when_the_content_changes(tmp_path, cache, model, tokenizer, monkeypatch):
    """A GGUF file is converted once, and again if its content changes."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    first = convert_gguf(path)
    with monkeypatch.context() as patch:
        patch.setattr(specs, "save_causal_lm", lambda *_: pytest.fail("converted twice"))
        assert convert_gguf(path) == first
    path.unlink()
    write_gguf(path, tiny_model("llama", len(tokenizer), seed=1), tokenizer)
    assert convert_gguf(path) != first


def test_without_the_package_the_error_names_the_extra(tmp_path, cache, model, tokenizer, monkeypatch):
    """Without the package gguf, the message says how to install it."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(UserError, match=r"tiny\.gguf .*dwakd\[gguf\]"):
        convert_gguf(path)
    assert list(cache.iterdir()) == []


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, cache, model, tokenizer, monkeypatch):
    """A failed conversion leaves no incomplete folder, which the next run would load."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)

    def broken(_, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(specs, "save_causal_lm", broken)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(path)
    assert list(cache.iterdir()) == []


def test_two_processes_may_convert_the_same_file(tmp_path, cache, model, tokenizer, monkeypatch):
    """Several processes may convert the same file at the same time."""
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)

    def raced(model, folder):
        save_causal_lm(model, folder)
        with monkeypatch.context() as patch:
            patch.setattr(specs, "save_causal_lm", save_causal_lm)
            convert_gguf(path)

    monkeypatch.setattr(specs, "save_causal_lm", raced)
    folder = convert_gguf(path)
    assert list(cache.iterdir()) == [folder]


def test_each_bad_file_gets_one_sentence(tmp_path, cache, model, tokenizer):
    """A damaged or incomplete file is an error of one sentence that names the file."""
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


@pytest.mark.parametrize("load", [load_tokenizer, load_causal_lm])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./none", "./none does not exist"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("~/no-such-folder-of-dwakd", "does not exist"),
        ("runs/a/student", "runs/a/student does not exist"),
        ("here/student", "here/student does not exist"),
        ("student/", "student/ does not exist"),
        ("", "is empty"),
        ("a.gguf", "write gguf:a.gguf"),
        ("gguf:none.gguf", "none.gguf does not exist"),
        ("package:torch", "write package:NAME/FILE"),
        ("package:no_such_package/m.gguf", "package no_such_package"),
        ("package:holder/none.gguf", "inner/m.gguf"),
        ("package:holder/../a.gguf", "../a.gguf"),
        ("here", "here"),
        ("owner/model", "owner/model from the Hugging Face Hub"),
    ],
)
def test_each_bad_spec_gets_one_sentence(load, spec, message, tmp_path, monkeypatch):
    """A mistyped path is an error of one sentence that names the path, not a traceback of the hub client."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "holder" / "inner").mkdir(parents=True)
    (tmp_path / "holder" / "__init__.py").touch()
    (tmp_path / "holder" / "inner" / "m.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_hub_model_is_told_apart_from_a_missing_network(monkeypatch):
    """A model that does not exist on the hub is reported as such, not as a problem of the network."""
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    def unknown(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "model_info", unknown)
    with pytest.raises(UserError, match=r"owner/modle .*Hub"):
        load_causal_lm("owner/modle")


def test_file_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    """A file in a package is found without importing the package."""
    package = tmp_path / "site" / "some_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    tiny_model("llama").save_pretrained(package / "tiny")
    info = tmp_path / "site" / "Some_Dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Some-Dist\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("some_models\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    for name in ("some_models", "some-dist", "Some_Dist"):
        assert load_causal_lm(f"package:{name}/tiny").num_parameters() > 0


def test_a_folder_has_no_revision(tmp_path):
    """A revision is refused for a folder, for which it would have no effect."""
    tokenizer = byte_bpe()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(UserError, match=rf"{tmp_path} .*revision v1\.0"):
            load(str(tmp_path), revision="v1.0")
