"""Test quantised teachers and students. Each test needs a package that quantises on a CPU, and is skipped without it."""

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight

from dwakd import load_causal_lm, load_tokenizer
from dwakd.errors import UserError
from dwakd.models.checks import check_head, relative_difference
from dwakd.models.head import final_hidden, output_head
from dwakd.recipe.recipe import load_recipe
from dwakd.training.run import train
from tests.builders import tiny_model
from tests.command_line import make_workspace, one_sentence, run

INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = [
    ("torchao", INT8),
    ("torchao", INT8 | {"include_input_output_embeddings": True}),
    ("bitsandbytes", NF4 | {"llm_int8_skip_modules": ["none"]}),
    ("bitsandbytes", {"load_in_8bit": True, "llm_int8_skip_modules": ["none"]}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "llama"
    wide_model(range(96)).save_pretrained(path)
    return path


def wide_model(vocabulary):
    """Return a model whose layers consist of whole blocks of bitsandbytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny_model("llama", len(vocabulary), **sizes)


@pytest.mark.parametrize(("package", "options"), KINDS)
def test_a_quantised_model_computes_with_its_quantised_weights(folder, package, options):
    """The logits are those of the quantised weights, and head and embeddings are plain matrices, which losses read."""
    pytest.importorskip(package)
    plain = load_causal_lm(str(folder))
    model = load_causal_lm(str(folder), quantization_config=options)
    expected = load_causal_lm(str(folder))  # with the quantised weights as plain numbers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            weight = dequantize_module_weight(module).detach().float()
            assert weight.shape == expected.get_submodule(name).weight.shape
            expected.get_submodule(name).weight.data = weight.clone()
    check_head(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = final_hidden(model, ids, torch.ones_like(ids))
        logits = output_head(model).logits(hidden[0])
        differences = [relative_difference(logits, other(input_ids=ids).logits[0]) for other in (expected, plain)]
    # bitsandbytes rounds activations to int8 or, on a CPU, to bfloat16
    assert differences[0] < {"torchao": 1e-4, "bitsandbytes": 0.05}[package], differences
    assert 3e-3 < differences[1] < 0.6, differences
    assert type(model.get_input_embeddings().weight) is type(output_head(model).weight) is torch.nn.Parameter
    layer = model.model.layers[0].self_attn.q_proj.weight
    assert type(layer).__name__ in ("Int8Tensor", "Params4bit", "Int8Params")
    model.lm_head = model.model.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match=r"the output head of .* is quantised; leave it out of the quantisation"):
        output_head(model)


def test_mistakes_in_the_options(folder):
    """Transformers ignores an unknown option of bitsandbytes, so the model would be quantised otherwise than the user wrote."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"quantization_config: bnb_4bit_quant_typ is unknown; .* bnb_4bit_quant_type"):
        load_causal_lm(str(folder), quantization_config={"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"})
    with pytest.raises(UserError, match=r"quant_method must be one of .*, got None"):
        load_causal_lm(str(folder), quantization_config={"bits": 4})


def test_qlora_student_with_a_quantised_teacher(tmp_path, monkeypatch, capsys):
    """The adapter of a 4-bit student learns from an 8-bit teacher; the cache of this teacher gives the same weights."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    folder = make_workspace(tmp_path)
    wide_model(load_tokenizer(str(folder / "student"))).save_pretrained(folder / "student")
    options = [
        f"teacher.quantization_config={INT8}",
        f"student.quantization_config={NF4}",
        "training.disable_tqdm=true",
    ]
    code, _, err = run(monkeypatch, capsys, "train", folder / "recipe.yaml", *options, "-o", tmp_path / "full")
    assert (code, "quantised weights cannot be trained: train an adapter" in one_sentence(err)) == (2, True)
    options += ["student.peft={r: 4, target_modules: [q_proj, v_proj]}", "training.max_steps=3", "training.seed=3"]
    states = []
    for extra in ([], [f"teacher.cache={tmp_path / 'cache'}"]):
        recipe = load_recipe(folder / "recipe.yaml", [*options, *extra, "loss.method=uld"])
        trainer = train(recipe, tmp_path / f"run{len(states)}")
        states.append({n: p.detach().clone() for n, p in trainer.student.named_parameters() if p.requires_grad})
    assert all("lora" in name for name in states[0])
    assert any(state.any() for name, state in states[0].items() if "lora_B" in name)
    for name, state in states[0].items():
        torch.testing.assert_close(states[1][name], state)
    plain = [item for item in [*options, *extra, "loss.method=uld"] if "teacher.quant" not in item]
    with pytest.raises(UserError, match=r"teacher\.dtype is .*quantised with.* in the cache and 'float32' here"):
        train(load_recipe(folder / "recipe.yaml", plain), tmp_path / "other")
    merged = load_causal_lm(str(tmp_path / "run0"))  # the adapter, merged into the weights that are not quantised
    assert not hasattr(merged, "peft_config")
