"""Test that shrunk models keep the right layers, have a consistent config and are saved as plain checkpoints."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from dwakd.evaluation.bits_per_byte import bits_per_byte
from dwakd.evaluation.options import RowOptions
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.models.rows import check_head
from dwakd.tools.shrink import shrink
from dwakd.tools.shrink.shrink import block_influence, shrink_model, shrink_to_folder
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe, tiny_model, unigram_byte_fallback, wordpiece
from tests.command_line import one_sentence, run

TEXTS = SAMPLE_TEXTS * 3
LAYERS = {"gpt2": "n_layer"}
FAMILIES = ["gpt2", "llama", "qwen2", "gemma2", "gemma3", "opt", "opt_projected", "mistral", "gpt_neox", "phi"]


def deep_model(family, vocab_size=400, layers=5):
    return tiny_model(family, vocab_size, **{LAYERS.get(family, "num_hidden_layers"): layers})


def same_special_ids(model, tokenizer):
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.bos_token_id = tokenizer.bos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_cuts_in_every_family_give_a_plain_checkpoint(family, tmp_path):
    """A student with fewer layers and tokens loads in transformers without dwakd, for every family."""
    tokenizer = byte_bpe()
    model = same_special_ids(deep_model(family), tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, new, kept, _ = shrink_model(model, tokenizer, TEXTS, num_layers=3, vocab_size=300)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert student.config.num_hidden_layers == len(kept) == 3
    assert student.config.vocab_size == len(new) == 300
    assert student.config.eos_token_id == new.eos_token_id == student.generation_config.eos_token_id
    assert student.num_parameters() < model.num_parameters()
    check_head(student)
    student.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    loaded, read = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = read(TEXTS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, student(ids).logits)
    loaded.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
def test_kept_layers_keep_their_weights_in_order(family):
    """The kept layers have their old weights and order."""
    tokenizer = byte_bpe()
    model = deep_model(family)
    student, _, kept_layers, _ = shrink_model(model, tokenizer, TEXTS, num_layers=3)
    assert kept_layers == sorted(kept_layers)
    assert (kept_layers[0], kept_layers[-1]) == (0, 4)

    def stack(lm):
        return next(module for module in lm.modules() if isinstance(module, torch.nn.ModuleList))

    for new, old in enumerate(kept_layers):
        for kept, whole in zip(stack(student)[new].parameters(), stack(model)[old].parameters(), strict=True):
            assert torch.equal(kept, whole)


def test_per_layer_lists_follow_their_layers():
    """Lists with one entry per layer, such as the attention types of Gemma 3, keep the entries of the kept layers."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = tiny_model("gemma3", 400, num_hidden_layers=5, layer_types=kinds)
    student, _, kept, _ = shrink_model(model, byte_bpe(), TEXTS, num_layers=3)
    assert student.config.layer_types == [kinds[index] for index in kept]


def test_influence_is_one_minus_the_cosine_and_an_idle_layer_is_removed():
    """The influence is 1 minus the cosine. A layer that changes nothing has influence 0 and is removed first."""
    model, tokenizer = deep_model("llama"), byte_bpe()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{name}").weight.zero_()
    influence = block_influence(model, tokenizer, TEXTS)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    cosines = []
    for text in TEXTS:
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        cosines.append(torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1).flatten())
    assert influence[1] == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-5)
    student, _, kept, _ = shrink_model(model, tokenizer, TEXTS, num_layers=4)
    assert kept == [0, 1, 3, 4]
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_influence_skips_empty_texts_and_leaves_the_model_as_it_was():
    """Empty texts are skipped, dropout is off, and the mode of the model is restored."""
    model, tokenizer = deep_model("gpt2").train(), byte_bpe()
    assert block_influence(model, tokenizer, ["", *TEXTS]) == block_influence(model, tokenizer, TEXTS)
    assert all(module.training for module in model.modules())


def test_the_texts_of_the_influence_are_spread_evenly(monkeypatch):
    """The rows of a file may be sorted, and the first of them would choose the layers."""
    seen = []
    monkeypatch.setattr(shrink, "block_influence", lambda model, tokenizer, texts: seen.append(texts) or [0.1] * 5)
    shrink_model(deep_model("llama"), byte_bpe(), [f"text {number}" for number in range(127)], num_layers=4)
    numbers = [int(text.split()[1]) for text in seen[0]]
    assert len(numbers) == 64
    assert numbers[0] == 0
    assert numbers[-1] >= 125


def test_texts_longer_than_the_positions_are_cut():
    """Learned positions end; a longer text must not."""
    model = tiny_model("gpt2", 400, n_layer=4, n_positions=16)
    assert block_influence(model, byte_bpe(), ["The quick brown fox. " * 20]) == pytest.approx(
        block_influence(model, byte_bpe(), ["The quick brown fox. " * 20], max_length=16)
    )


@pytest.mark.parametrize("builder", [byte_bpe, unigram_byte_fallback, bpe_byte_fallback, wordpiece])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_matrices_start_from_the_old_tokens(builder, family):
    """Head and embeddings of the new tokens come from the right old tokens, for tied, untied and biased heads."""
    tokenizer = builder()
    model = same_special_ids(deep_model(family, 450, layers=2), tokenizer)
    size = {"byte_bpe": 330, "wordpiece": 250}.get(builder.__name__, 370)
    student, new, *_ = shrink_model(model, tokenizer, TEXTS, vocab_size=size)
    shared = {token: index for token, index in new.get_vocab().items() if token in tokenizer.get_vocab()}
    assert len(shared) > 100
    olds = torch.tensor([tokenizer.get_vocab()[token] for token in shared])
    news = torch.tensor(list(shared.values()))
    for before, after in (
        (model.get_input_embeddings(), student.get_input_embeddings()),
        (model.get_output_embeddings(), student.get_output_embeddings()),
    ):
        assert torch.equal(after.weight[news], before.weight[olds])
    if family == "phi":
        assert torch.equal(student.lm_head.bias[news], model.lm_head.bias[olds])
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied == (family == "qwen2")


def test_lists_of_end_tokens_follow_their_strings():
    """Lists of end tokens, as in Llama 3, get the new ids of the same strings."""
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<gone>"]})
    tokenizer.chat_template = "<turn>"
    model = deep_model("llama", 420)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 401, 400]
    student, new, *_ = shrink_model(model, tokenizer, TEXTS, vocab_size=300)
    turn = new.convert_tokens_to_ids("<turn>")
    assert student.generation_config.eos_token_id == [new.eos_token_id, turn]


def test_the_report_has_sizes_and_bits_per_byte_of_both_models(workspace, tmp_path):
    """The report contains sizes and bits per byte of both models, each measured with its own tokenizer."""
    data, output = str(workspace / "data.jsonl"), tmp_path / "student"
    sizes = {"num_layers": 2, "vocab_size": 300}
    table = shrink_to_folder(str(workspace / "teacher"), data, output, RowOptions(), **sizes, eval_data=data)
    cells = {name: list(row) for name, *row in zip(*(column.cells for column in table.columns), strict=True)}
    rows = load_examples(data)
    for index, folder in enumerate((workspace / "teacher", output)):
        model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
        assert cells["layers"][index] == str(model.config.num_hidden_layers)
        assert cells["vocabulary"][index] == f"{len(tokenizer):,}"
        assert cells["parameters"][index] == f"{model.num_parameters():,}"
        bits = bits_per_byte(model, TextEncoder(tokenizer, "plain"), rows)
        assert cells["bits per byte, untrained"][index] == f"{bits.value:.3f}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to shrink"),
        ({"num_layers": 1}, "2 to 5"),
        ({"num_layers": 6}, "2 to 5"),
        ({"vocab_size": 100}, "--vocab-size.* 257 "),
        ({"num_layers": 3, "texts": ["", ""]}, "no text"),
    ],
)
def test_mistakes(options, message):
    """An invalid size raises an error that names the option and the valid range."""
    options = {"texts": TEXTS, **options}
    with pytest.raises(UserError, match=message):
        shrink_model(deep_model("llama"), byte_bpe(), options.pop("texts"), **options)


@pytest.mark.parametrize(("layers", "asked"), [(1, 2), (2, 3)])
def test_models_with_no_layer_to_drop_say_so(layers, asked):
    """For a model whose layers cannot be reduced, the message says to leave the option out."""
    with pytest.raises(UserError, match=rf"--layers.* has {layers} layers .*leave the option out"):
        shrink_model(deep_model("llama", layers=layers), byte_bpe(), TEXTS, num_layers=asked)
    with pytest.raises(UserError, match=r"--layers.*--vocab-size"):
        shrink_model(deep_model("llama", layers=layers), byte_bpe(), TEXTS)


def test_the_command(workspace, tmp_path, monkeypatch, capsys):
    """The command saves a smaller student. The message about a vocabulary that is too small names the size."""
    student = tmp_path / "student"
    shutil.copytree(workspace / "student", tmp_path / "original")
    settings = tmp_path / "original" / "generation_config.json"  # transformers refuses to save these settings
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_sample": False, "temperature": 0.6}))
    arguments = ["shrink", tmp_path / "original", "-d", workspace / "data.jsonl", "--layers", 2]
    code, out, err = run(monkeypatch, capsys, *arguments, "--vocab-size", 300, "-o", student)
    assert code == 0, err
    assert "bits per byte" in out
    assert (student / "config.json").is_file()
    code, _, err = run(monkeypatch, capsys, *arguments, "--vocab-size", 20, "-o", tmp_path / "other")
    assert code == 2
    assert "20" in one_sentence(err)
    assert not (tmp_path / "other").exists()
