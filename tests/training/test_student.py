"""Test that a student which cannot be trained or restored is refused before the first step."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from dwakd import METHODS, DistillConfig, DistillTrainer, UserError
from dwakd.losses import method_options
from dwakd.training.student import add_adapter, check_student, disable_dropout
from tests.builders import FAMILIES, byte_bpe, tiny_model
from tests.training.builders import ROWS, TOKENIZERS


def run_of(student, folder, teacher=None, **options) -> DistillTrainer:
    """Return a trainer of one step for a student that is passed as a model."""
    arguments = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "template": "plain", "save_strategy": "no"}
    own, theirs = TOKENIZERS
    return DistillTrainer(
        student,
        tiny_model("gemma2", len(theirs), seed=2) if teacher is None else teacher,
        DistillConfig(output_dir=str(folder), **{**arguments, **options}),
        ROWS,
        processing_class=own,
        teacher_processing_class=own if teacher is not None else theirs,
    )


@pytest.mark.parametrize("method", ["sft", "uld", "dwa_kd", "dskd_v2"])
def test_a_frozen_student_is_refused(tmp_path, method):
    """A student without trainable parameters is refused, because only the projectors would be trained."""
    base = tiny_model("llama", len(TOKENIZERS[0]))
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("llama", len(TOKENIZERS[0])), tmp_path / "adapter")
    frozen = tiny_model("llama", len(TOKENIZERS[0])).requires_grad_(False)
    for student in (loaded, frozen):
        with pytest.raises(UserError, match=r"no parameter of the student .* requires_grad"):
            run_of(student, tmp_path, method=method)


def test_a_student_in_half_precision(tmp_path, caplog):
    """In float16, AdamW's second moments become 0 and updates explode; in bfloat16, small updates are rounded away."""
    half = tiny_model("llama", len(TOKENIZERS[0])).to(torch.float16)
    with pytest.raises(UserError, match=r"would be trained in float16: load the student with dtype=torch\.float32"):
        run_of(half, tmp_path)
    assert "bfloat16" not in caplog.text
    run_of(tiny_model("llama", len(TOKENIZERS[0])).to(torch.bfloat16), tmp_path)
    assert "is trained in bfloat16, which rounds small updates away" in caplog.text
    caplog.clear()
    adapted = get_peft_model(half, LoraConfig(task_type="CAUSAL_LM"))
    run_of(adapted, tmp_path)
    assert "bfloat16" not in caplog.text, "the adapter is in float32"


@pytest.mark.parametrize("adapter", [False, True])
def test_parts_that_read_images_are_frozen(tmp_path, adapter, caplog):
    """They get no gradient from text, for which DDP would wait; the student is trained and saved as before."""
    text = {"vocab_size": len(TOKENIZERS[0]), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=5, eoi_token_index=6, image_token_index=7,
    )  # fmt: skip
    student = Gemma3ForConditionalGeneration(config)
    student = get_peft_model(student, LoraConfig(target_modules=["q_proj"])) if adapter else student
    run = run_of(student, tmp_path)
    assert "parameters that read no text are not trained" in caplog.text
    run.train()
    ids = torch.tensor([[8, 9, 10]])
    student(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    trained = {name for name, one in student.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in student.named_parameters() if one.grad is not None}
    assert any("language_model" in name for name in trained)
    assert not any("projector" in name or "vision" in name for name in trained)


def test_a_teacher_that_shares_the_students_weights_is_refused(tmp_path):
    """A teacher that shares parameters with the student is refused, because freezing it would freeze the student."""
    student = tiny_model("llama", len(TOKENIZERS[0]))
    same_table = tiny_model("llama", len(TOKENIZERS[0]), seed=5)
    same_table.model.embed_tokens.weight = student.model.embed_tokens.weight
    base = tiny_model("llama", len(TOKENIZERS[0]), seed=6)
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    for own, teacher in ((student, student), (student, same_table), (adapted, base)):
        with pytest.raises(UserError, match="share the parameter"):
            run_of(own, tmp_path, teacher)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_restorable(family):
    """Ordinary models of every family are accepted and not changed."""
    for dtype in (torch.float32, torch.bfloat16):
        student = tiny_model(family, dtype=dtype).to(dtype)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        check_student(student)
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def head_with_bias(model):
    model.lm_head = torch.nn.Linear(32, 300)


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def layer_removed(model):
    del model.model.layers[1]


def layer_shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def narrower_layer(model):
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 40, bias=False)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def generation_setting_in_config(model):
    model.config.temperature = 0.6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (head_with_bias, r"lm_head\.bias"),
        (tied_by_hand, r"lm_head\.weight"),
        (layer_removed, r"model\.layers\.1"),
        (layer_shared, r"model\.layers\.1\.mlp"),
        (narrower_layer, r"model\.layers\.0\.mlp"),
        (other_activation, "logits differ"),
        (generation_setting_in_config, "temperature"),
    ],
)
def test_a_student_that_its_config_does_not_describe_is_refused(change, named):
    """A student is refused if its saved folder would load as another model."""
    student = tiny_model("llama")
    change(student)
    with pytest.raises(UserError, match=named):
        check_student(student)


def test_a_subclass_is_restored_as_what_transformers_loads():
    """A subclass that changes the logits is refused, because its folder loads as the registered class."""

    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    student = Doubled(tiny_model("llama").config)
    with torch.no_grad():
        student.lm_head.weight.normal_()
    with pytest.raises(UserError, match="logits differ"):
        check_student(student)


def test_harmless_differences_are_accepted():
    """Rotary frequencies that were rounded by a cast and additional buffers are accepted."""
    for family in ("llama", "qwen2", "gemma2"):
        check_student(tiny_model(family).to(torch.bfloat16).float())
        check_student(tiny_model(family, num_hidden_layers=12).to(torch.bfloat16))
    student = tiny_model("llama")
    student.register_buffer("extra", torch.ones(2))
    check_student(student)
    slower = tiny_model("llama")
    slower.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(UserError, match="logits differ"):
        check_student(slower)


def test_a_class_that_is_not_registered_is_read_by_its_own_config():
    """A model class of the user's own project, which is not registered in transformers, is accepted."""

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

    check_student(OwnModel(OwnConfig(**{**tiny_model("llama").config.to_dict(), "model_type": "own_llama"})))


def test_adapters_that_cannot_be_read_back_are_refused():
    """Adapters with a random initialisation that is not saved or with replicated layers are refused."""
    for options, named in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ):
        student = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], **options))
        with pytest.raises(UserError, match=named):
            check_student(student)


def test_an_adapter_on_an_adapted_student_is_refused(tmp_path):
    """`peft_config` is refused for a student that already has an adapter."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    student = get_peft_model(tiny_model("llama", len(TOKENIZERS[0])), config)
    with pytest.raises(UserError, match="leave out peft_config"):
        DistillTrainer(
            student,
            None,
            DistillConfig(output_dir=str(tmp_path), use_cpu=True, method="sft"),
            ROWS,
            processing_class=TOKENIZERS[0],
            peft_config=config,
        )


def test_adapters_that_could_not_be_loaded(caplog):
    """An adapter of another task is refused, and one on a base model that is saved nowhere gives a warning."""
    student = tiny_model("llama", len(TOKENIZERS[0]))
    with pytest.raises(UserError, match="task_type of the adapter must be CAUSAL_LM, got SEQ_CLS"):
        add_adapter(student, LoraConfig(r=2, task_type="SEQ_CLS"))
    student.config.name_or_path = "somewhere"
    assert isinstance(add_adapter(student, {"r": 2}), PeftModel)
    assert not caplog.text
    add_adapter(tiny_model("llama", len(TOKENIZERS[0])), LoraConfig(r=2))
    assert "saved without the name of its base model: save the base model" in caplog.text


def test_settings_that_greedy_decoding_ignores_are_removed(caplog):
    """Sampling settings without do_sample, as Llama 2 Chat's, are reset, because transformers cannot save them."""
    student = tiny_model("llama")
    student.generation_config.temperature, student.generation_config.top_p = 0.6, 0.9
    with caplog.at_level(logging.WARNING):
        check_student(student)
    assert "temperature, top_p" in caplog.text
    assert student.generation_config.temperature in (None, 1.0)
    student.generation_config.do_sample, student.generation_config.temperature = True, 0.6
    check_student(student)
    assert student.generation_config.temperature == 0.6
    student.generation_config.max_new_tokens = -1
    with pytest.raises(UserError, match="max_new_tokens"):
        check_student(student)


def test_adapters_that_would_be_lost_are_refused():
    """A second adapter or a trained base weight is refused, because PEFT saves the tensors of one adapter only."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    two = get_peft_model(tiny_model("llama"), config)
    two.add_adapter("second", config)
    with pytest.raises(UserError, match="default, second"):
        check_student(two)
    unfrozen = get_peft_model(tiny_model("llama"), config)
    unfrozen.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"norm\.weight .* modules_to_save"):
        check_student(unfrozen)
    inside = tiny_model("llama")
    inside.add_adapter(config)
    with pytest.raises(UserError, match="add_adapter"):
        check_student(inside)
    check_student(get_peft_model(tiny_model("qwen2"), LoraConfig(r=2, modules_to_save=["lm_head", "embed_tokens"])))


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("phi", {"attention_dropout": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}),
        ("gpt_neox", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
    ],
)
def test_every_dropout_is_disabled(family, rates):
    """Dropout rates in modules, plain attributes and configs are set to 0."""
    student = tiny_model(family, **rates)
    noisy, quiet = hidden_of_two_seeds(student), (disable_dropout(student), hidden_of_two_seeds(student))[1]
    assert not torch.equal(*noisy)
    assert torch.equal(*quiet)
    assert {name: getattr(student.config, name) for name in rates} == rates, "the saved config must not change"


def test_dropout_that_a_forward_reads_from_its_config_is_disabled():
    """Dropout rates that a model reads from its config at every step, as Falcon does, are set to 0."""
    from transformers import FalconConfig

    config = FalconConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.3,
        attention_dropout=0.3,
    )
    student = AutoModelForCausalLM.from_config(config)
    assert not torch.equal(*hidden_of_two_seeds(student))
    disable_dropout(student)
    assert torch.equal(*hidden_of_two_seeds(student))
    assert student.config.hidden_dropout == 0.3


def hidden_of_two_seeds(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states in training mode for two seeds of the dropout."""
    ids, found = torch.arange(40).view(2, 20), []
    for seed in (1, 2):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            found.append(model.train().base_model(input_ids=ids).last_hidden_state)
    return found[0], found[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_bfloat16(tmp_path, method):
    """Every method trains with autocast, where hidden states have another dtype than the head."""
    own = TOKENIZERS[0]
    same = method_options(method).needs_same_vocabulary
    student = tiny_model("llama", len(own), seed=1)
    teacher = tiny_model("gemma2", len(own), seed=2) if same else None
    run = run_of(student, tmp_path, teacher, method=method, bf16=True, max_steps=2)
    run.train()
    assert all(torch.isfinite(torch.tensor(value)) for value in run.state.log_history[0].values())


def test_callbacks_receive_the_student(tmp_path):
    """Callbacks get the student as `model`, so that they can call `model.generate`."""
    from transformers import TrainerCallback

    class Sample(TrainerCallback):
        answers: list = []  # noqa: RUF012

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.answers.append(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False))

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.on_step_end(args, state, control, model)

    run = run_of(tiny_model("llama", len(byte_bpe())), tmp_path, method="sft")
    run.add_callback(Sample())
    run.evaluate(ROWS[:2])
    run.train()
    assert len(Sample.answers) == 2
