"""Test that models, adapters and tokenizers are loaded with safe defaults and that each error is one sentence."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dwakd.errors import UserError
from dwakd.models.loading import align_special_tokens, check_vocabulary, load_causal_lm, load_tokenizer
from tests.builders import CHAT_TEMPLATE, byte_bpe, tiny_model, unigram_byte_fallback
from tests.data.chat import chatml
from tests.models.architectures import small_model

IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a model and its tokenizer."""
    tokenizer = byte_bpe()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_adapter(folder, target, base=None, targets=("q_proj", "up_proj")):
    """Save a LoRA adapter with a visible effect and return the logits of the base model with it."""
    adapted = get_peft_model(load_causal_lm(str(folder)), LoraConfig(r=4, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    logits = adapted.eval()(IDS).logits.detach()
    adapted.save_pretrained(target)
    if base is not None:
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return logits


def test_folder(folder):
    """A model is loaded in eval mode and float32 and gives the same logits."""
    model = load_causal_lm(str(folder))
    assert not model.training
    assert model.dtype == torch.float32
    assert load_causal_lm(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(model(IDS).logits, tiny_model("llama", 400)(IDS).logits)
    assert load_tokenizer(str(folder))("a b").input_ids == byte_bpe()("a b").input_ids


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "gemma3", "opt_projected", "gpt_neox", "phi"])
def test_every_family_survives_saving_and_loading(family, tmp_path):
    """A saved model of every family loads with the same weights, tied heads included."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_causal_lm(str(tmp_path))(IDS).logits, model(IDS).logits)


def test_adapter_folder_and_adapter_argument_merge(folder, tmp_path):
    """An adapter is merged if it is given as the model or with the argument `adapter`."""
    expected = save_adapter(folder, tmp_path / "adapter")
    for model in (
        load_causal_lm(str(tmp_path / "adapter")),
        load_causal_lm(str(folder), adapter=str(tmp_path / "adapter")),
    ):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        assert not any("lora" in name for name, _ in model.named_parameters())
    assert load_tokenizer(str(tmp_path / "adapter")).eos_token == "<|endoftext|>"
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_causal_lm(str(tmp_path / "merged"))(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapter_mistakes(folder, tmp_path):
    """An adapter that does not fit, or whose base model does not exist, is an error."""
    save_adapter(folder, tmp_path / "lost", base=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"base_model_name_or_path"):
        load_causal_lm(str(tmp_path / "lost"))
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_causal_lm(str(folder), adapter=str(folder))
    tiny_model("llama", 400, num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(UserError, match=r"adapter of .*lost"):
        load_causal_lm(str(tmp_path / "deeper"), adapter=str(tmp_path / "lost"))


def test_missing_pad_token_becomes_eos(tmp_path):
    """A tokenizer without a pad token, as those of GPT-2 and Llama, uses the end-of-sequence token."""
    bare = byte_bpe()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(str(tmp_path)).pad_token_id == bare.eos_token_id


def test_tokenizer_without_end_of_sequence_is_refused(tmp_path):
    """A tokenizer without an end-of-sequence token is refused, because the student could not learn to end answers."""
    PreTrainedTokenizerFast(tokenizer_object=byte_bpe().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_larger_than_the_embedding_table_is_refused():
    """A tokenizer with more tokens than embeddings is refused; one with fewer is accepted."""
    tokenizer = unigram_byte_fallback()
    check_vocabulary(tiny_model("llama", 512), tokenizer, "x")
    with pytest.raises(UserError, match=rf"x .*{len(tokenizer) - 1}, .*300"):
        check_vocabulary(tiny_model("llama", 300), tokenizer, "x")


def test_ids_above_the_embedding_table_are_refused():
    """A tokenizer with unused ids needs more embeddings than it has tokens; training would end with an IndexError."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "c": 50}, "a")))
    assert len(tokenizer) == 3
    check_vocabulary(tiny_model("llama", 51), tokenizer, "x")
    with pytest.raises(UserError, match=r"x has token ids up to 50, but the model has 50 embeddings"):
        check_vocabulary(tiny_model("llama", 50), tokenizer, "x")


def test_checkpoint_with_missing_weights_is_refused(folder):
    """A checkpoint with missing weights is refused. transformers would initialise them randomly and only warn."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{folder}.* 1 .*up_proj"):
        load_causal_lm(str(folder))


def test_remote_code_is_not_run_unless_asked_for(folder, tmp_path):
    """Python code of a downloaded repository runs only with `trust_remote_code`."""
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="strange", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit")
    with pytest.raises(UserError):
        load_causal_lm(str(folder))
    assert not (tmp_path / "ran").exists()


def test_settings_take_the_tokenizer_s_special_tokens():
    """The model's settings get the tokenizer's end token, without which answers would continue to the limit."""
    tokenizer = unigram_byte_fallback()  # <s> is 1; </s> is 2 and also the pad token
    model = tiny_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = [7, 1]
    model.config.eos_token_id = 1
    align_special_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, 7, 1], "what ended an answer still does"
    assert (model.config.eos_token_id, model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2, 2)
    align_special_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, 7, 1]


def test_merging_an_adapter_is_quiet(folder, tmp_path, recwarn):
    """PEFT's deprecation warning, which the user cannot fix, is hidden."""
    save_adapter(folder, tmp_path / "adapter")
    recwarn.clear()
    load_causal_lm(str(tmp_path / "adapter"))
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_a_causal_class_that_auto_classes_do_not_know_is_read_back(tmp_path):
    """A saved model of a class that AutoModelForCausalLM does not support, such as Emu3's, can be loaded."""
    model = small_model("emu3")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_causal_lm(str(tmp_path))(IDS).logits, model(IDS).logits)


def test_a_folder_of_named_adapters_is_refused_by_their_names(folder, tmp_path):
    """A folder with adapters in subfolders only is refused, and the message lists the subfolders."""
    save_adapter(folder, tmp_path / "all" / "poems")
    expected = load_causal_lm(str(tmp_path / "all" / "poems"))(IDS).logits
    torch.testing.assert_close(
        load_causal_lm(str(folder), adapter=str(tmp_path / "all" / "poems"))(IDS).logits, expected
    )
    with pytest.raises(UserError, match=r"all .*: poems"):
        load_causal_lm(str(tmp_path / "all"))
    with pytest.raises(UserError, match=r"all .*: poems"):
        load_causal_lm(str(folder), adapter=str(tmp_path / "all"))


def test_an_adapter_on_the_head_of_a_tied_teacher_gives_its_own_logits(tmp_path):
    """An adapter on the head of a tied model is merged into a copy of the matrix, so that the embeddings do not change."""
    tiny_model("qwen2", 400).save_pretrained(tmp_path / "model")
    expected = save_adapter(tmp_path / "model", tmp_path / "adapter", targets=["q_proj", "lm_head"])
    for model in (
        load_causal_lm(str(tmp_path / "adapter")),
        load_causal_lm(str(tmp_path / "model"), adapter=str(tmp_path / "adapter")),
    ):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("content", ["[1]", '{"peft_type": "UNKNOWN"}', "{"])
def test_an_adapter_config_that_cannot_be_read_is_refused(content, folder, tmp_path):
    """An adapter_config.json that cannot be read raises a UserError that names the folder."""
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_causal_lm(str(folder), adapter=str(tmp_path))


def test_a_chat_template_from_elsewhere_is_saved_with_the_tokenizer(folder, tmp_path):
    """A base model gets the template of a file or of a chat model, and keeps it when it is saved."""
    plain = byte_bpe()
    plain.chat_template = None
    plain.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    chatml().save_pretrained(tmp_path / "chat")
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    for source, expected in ((tmp_path / "chat", chatml().chat_template), (file, CHAT_TEMPLATE)):
        tokenizer = load_tokenizer(str(folder), chat_template_path=str(source))
        assert len(tokenizer) == len(load_tokenizer(str(folder)))
        tokenizer.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(str(tmp_path / "saved")).chat_template == expected
    for source, message in (
        (folder, "has no chat template; give a file with one"),
        (tmp_path / "none.jinja", "could not read the chat template in .*none.jinja"),
        (tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(folder), chat_template_path=str(source))
