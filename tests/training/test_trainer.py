"""Test invariants of training on tiny models with two tokenizers."""

import json
import logging
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dwakd import METHODS, DistillConfig, DistillTrainer, UserError
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import load_examples
from dwakd.training.arguments import checked_args
from dwakd.training.distiller import LOSS_STATE
from tests.builders import CHAT_TEMPLATE, FAMILIES, bpe_byte_fallback, byte_bpe, tiny_model
from tests.training.builders import ROWS, assert_same, on_policy, trainer, weights


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path, method):
    """Every term is logged, and the saved student loads in transformers without dwakd.

    Another run with the same seed gives the same weights to the last bit, and gradient accumulation the same terms and weights.
    """
    run = trainer(tmp_path, method=method)
    before = weights(run)
    run.train()
    run.save_model()
    logs = [entry for entry in run.state.log_history if "ce" in entry]
    assert len(logs) == 4
    terms = set(METHODS[method].terms) - {"uncommon"}  # a term of x_token with objective: h_kl
    assert all(entry.keys() >= terms | {"loss", "learning_rate", "grad_norm"} for entry in logs)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run).items() if "student" in name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in run.student.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path)("a cat")["input_ids"] == run.processing_class("a cat")["input_ids"]
    # vLLM and SGLang load all tensors of these files into the student
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    saved = tmp_path / LOSS_STATE
    assert saved.is_file() is any(True for _ in run.model.loss.parameters())
    if saved.is_file():  # later tools can load the maps
        with safe_open(saved, "pt") as file:
            assert json.loads(file.metadata()["loss"]) == {"method": method}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert_same(state, dict(run.model.loss.state_dict()))
    again = trainer(tmp_path / "again", method=method)
    split = trainer(tmp_path / "split", method=method, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for other in (again, split):
        other.train()
    assert_same(weights(again), weights(run))
    for one, other in zip(run.state.log_history, split.state.log_history, strict=True):
        for name in set(METHODS[method].terms) & one.keys():
            assert one[name] == pytest.approx(other[name], rel=2e-4), name
    assert_same(weights(split), weights(run), atol=2e-4)


def test_another_seed_gives_another_run(tmp_path):
    """Runs with different seeds differ. Otherwise, two runs with the same seed would be equal without a seed."""
    runs = [trainer(tmp_path / str(seed), seed=seed) for seed in (3, 4)]
    assert not torch.equal(runs[0].model.loss.projectors.t2s.weight, runs[1].model.loss.projectors.t2s.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "max_tokens_per_batch": 300},
        {"method": "min_ed", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "padding_free": True},
        {
            "method": "sft",
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 5,
            "max_tokens_per_batch": 1,
        },
        {"method": "alm", "per_device_train_batch_size": 5, **on_policy(0.5)},
    ],
)
def test_batches_by_tokens_change_nothing_else(tmp_path, options):
    """Batches by tokens take the rows of the same steps, stay below the limit, and give the same terms and weights.

    So does `padding_free`, which counts no padding. A row above the limit is the only row of its micro-batch. With thirteen
    rows, the last step of an epoch is incomplete.
    """
    rows = [{**row, "response": row["response"] * (1 + index % 5)} for index, row in enumerate(ROWS[:13])]
    options = {"max_tokens_per_batch": 400, "max_steps": 3, **options}
    packed = options.pop("padding_free", False)
    limit, size = options.pop("max_tokens_per_batch"), options["per_device_train_batch_size"]
    accumulation = options.get("gradient_accumulation_steps", 1)
    seen: list[dict[int, list[tuple[int, ...]]]] = [{}, {}]
    runs = []
    for own, max_tokens in zip(seen, (None, limit), strict=True):
        options["padding_free"] = packed and max_tokens is not None
        run = trainer(tmp_path, rows=rows, max_tokens_per_batch=max_tokens, **options)
        compute = run.compute_loss

        def noted(model, micro, *args, own=own, run=run, compute=compute, max_tokens=max_tokens, **kwargs):
            ids = micro.batch.example_ids
            own.setdefault(run.state.global_step, []).append(ids)
            masks = [tokens.attention_mask for tokens in micro.batch]
            num_tokens = sum(int(mask.sum()) if packed else mask.numel() for mask in masks)
            assert max_tokens is None or len(ids) == 1 or num_tokens <= max_tokens
            return compute(model, micro, *args, **kwargs)

        run.compute_loss = noted
        run.train()
        runs.append(run)
    fixed, by_tokens = ({step: sorted(sum(ids, ())) for step, ids in own.items()} for own in seen)
    assert fixed == by_tokens
    assert len(by_tokens[0]) == min(size * accumulation, 13)
    assert len(seen[1][0]) != len(seen[0][0])
    assert any(len(ids) > 1 for ids in seen[1][0]) is (limit > 1)
    for one, other in zip(*(run.state.log_history for run in runs), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            if "per_second" not in name:
                assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-6), name
    assert_same(weights(runs[1]), weights(runs[0]), atol=2e-4)


BY_TOKENS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 150}


@pytest.mark.parametrize(
    ("lora", "order", "others"),
    [(False, "random", {}), (True, "random", BY_TOKENS), (False, "group_by_length", {})],
)
def test_resumed_run_ends_with_the_same_student(tmp_path, lora, order, others):
    """A resumed run continues with the same projectors, optimiser, schedule, gamma and data order."""
    schedule = {"gamma": 2.0, "gamma_end": 0.5, "gamma_steps": 6}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "loss_options": schedule, "lora": lora}
    options |= {"train_sampling_strategy": order, "logging_steps": 2, **others}
    whole = trainer(tmp_path / "run", **options)
    whole.train()
    resumed = trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [[{n: v for n, v in e.items() if n not in times} for e in run.state.log_history] for run in (whole, resumed)]
    assert logs[0][:2] == logs[1][:2]
    assert resumed.state.global_step == 6
    assert resumed.model.loss.gamma == whole.model.loss.gamma == pytest.approx(2.0 - 1.5 * 5 / 6)
    assert_same(weights(resumed), weights(whole))


def test_a_resumed_run_may_have_equal_rates(tmp_path):
    """The groups of parameters do not depend on the rates, or the optimiser could not be loaded."""
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    equal = trainer(tmp_path, learning_rate=1e-3, projector_learning_rate=1e-3, weight_decay=0.0)
    equal.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal.state.global_step == 4


def test_steps_of_other_sizes_cannot_be_continued(tmp_path, caplog):
    """The schedule and the order of the rows would be those of another run."""
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(
        UserError, match="the checkpoint has 4 rows in a step, but this run with 1 processes has 8: set"
    ):
        trainer(tmp_path, per_device_train_batch_size=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "checkpoints of an earlier run" not in caplog.text
    trainer(tmp_path).train()
    assert "has checkpoints of an earlier run, such as checkpoint-4: delete them" in caplog.text


def test_the_config_of_the_student_is_the_users(tmp_path):
    """transformers switches the cache off for the training, which makes the generation of other programs slow."""
    run = trainer(tmp_path, method="sft", max_steps=1)
    assert run.student.config.use_cache
    run.train()
    run.save_model()
    assert run.student.config.use_cache
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache


def test_projectors_have_their_own_learning_rate(tmp_path):
    """Projectors have their own learning rate, because the student's is too small for them."""
    run = trainer(tmp_path, learning_rate=1e-5, projector_learning_rate=3e-3)
    own = {id(parameter) for parameter in run.model.loss.parameters()}
    for group in run.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (3e-3 if id(parameter) in own else 1e-5)
    counted = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert counted == sum(parameter.requires_grad for parameter in run.model.parameters())


def test_teacher_is_neither_trained_nor_saved(tmp_path):
    """The teacher is not part of the trained module and therefore neither trained, nor saved, nor put into train mode."""
    run = trainer(tmp_path)
    teacher = run.teachers[0].model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    run.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert sum(1 for name, _ in run.model.named_parameters() if "teacher" in name) == 0


def test_lora_adapter_loads_with_peft(tmp_path):
    """PEFT can load the saved adapter: its parameter names do not contain those of dwakd's module."""
    run = trainer(tmp_path, lora=True)
    run.train()
    run.save_model()
    assert (tmp_path / "adapter_config.json").is_file()
    base = tiny_model("llama", len(run.processing_class), seed=1)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[5, 9, 30]])
    torch.testing.assert_close(loaded(ids).logits, run.student.eval()(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny_model("llama", len(run.processing_class), seed=1)(ids).logits)


def test_evaluation_is_exact_over_the_set_and_selects_the_best(tmp_path):
    """Metrics do not depend on the batch size, and the best checkpoint is loaded at the end."""
    results = []
    for size in (1, 5):
        run = trainer(tmp_path / str(size), method="dskd", eval_rows=ROWS[:7], per_device_eval_batch_size=size)
        results.append(run.evaluate())
    for name in ("eval_ce", "eval_bits_per_byte"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)
    run = trainer(
        tmp_path / "best",
        method="sft",
        max_steps=6,
        eval_rows=ROWS[:4],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.05,
    )
    run.train()
    assert (run.args.metric_for_best_model, run.args.greater_is_better) == ("bits_per_byte", False)
    best = min(entry["eval_ce"] for entry in run.state.log_history if "eval_ce" in entry)
    assert run.evaluate()["eval_ce"] == pytest.approx(best, rel=1e-5)


def test_best_checkpoint_restores_its_projectors(tmp_path):
    """The projectors at the end are those of the best checkpoint."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(tmp_path, max_steps=6, eval_rows=ROWS[:4], projector_learning_rate=0.5, **often, **best)
    run.train()
    logged = max(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(logged, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Gradient checkpointing gives the same gradients."""
    runs = [trainer(tmp_path / str(on), max_steps=2, activation_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    assert_same(weights(runs[1]), weights(runs[0]), atol=1e-6)


def test_answers_during_training(tmp_path):
    """Evaluation reports ROUGE-L and the user's metric and does not change the random state of the training."""
    seen = []

    def metric(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"words": float(len(prediction.predictions))}

    run = trainer(tmp_path / "a", method="sft", eval_rows=ROWS[:3], eval_rouge_l=True, eval_max_new_tokens=5)
    run.metrics_function = metric
    state = torch.random.get_rng_state()
    metrics = run.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0 <= metrics["eval_rouge_l"] <= 100
    assert metrics["eval_words"] == 3
    assert seen[0][1] == [[row["response"]] for row in ROWS[:3]]
    assert run.evaluate(ROWS[:2])["eval_words"] == 2, "as in transformers, also for a set that is given here"
    assert "eval_words" not in run.evaluate(run.train_dataset)
    long = [*ROWS[:2], {"prompt": "word " * 600, "response": "end"}]
    with pytest.raises(UserError, match=r"the eval dataset, row 2 .* leaves no room"):
        trainer(tmp_path / "b", method="sft", eval_rows=long, eval_rouge_l=True, invalid_rows="skip")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_student_and_teacher(tmp_path, family):
    """Every architecture works as the student and as the teacher."""
    if family != "opt_projected":  # embeddings narrower than hidden states are allowed for students
        run = trainer(tmp_path / "teacher", teacher=family, max_steps=1)
        run.train()
        assert run.state.log_history[0]["kd_teacher"] > 0
    run = trainer(tmp_path / "student", student=family, max_steps=1)
    run.train()
    assert all(torch.isfinite(torch.tensor(value)) for value in run.state.log_history[0].values())


def test_noise_on_embeddings_and_other_sets(tmp_path):
    """NEFTune works, and `evaluate` accepts the same data sets as the constructor."""
    run = trainer(tmp_path, max_steps=1, neftune_noise_alpha=5.0)
    run.train()
    metrics = run.evaluate(ROWS[:3], metric_key_prefix="test")
    assert metrics["test_ce"] > 0
    with pytest.raises(UserError, match="generate_answers"):
        run.predict(ROWS)


def test_an_optimizer_that_lacks_the_maps_is_refused(tmp_path):
    """The trainer creates the maps and the adapter, so an optimiser that was made before contains neither."""
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True, template="plain", max_steps=1, save_strategy="no")
    for peft, missing in ((None, r"loss\..*"), (LoraConfig(r=2, task_type="CAUSAL_LM"), "student.*lora_A.*")):
        student = tiny_model("llama", 400)
        given = {"processing_class": byte_bpe(), "teacher_processing_class": byte_bpe(), "peft_config": peft}
        optimizers = torch.optim.AdamW(student.parameters()), None
        with pytest.raises(UserError, match=f"lacks the trained parameter {missing}: use optim and optim_args"):
            DistillTrainer(student, tiny_model("gemma2", 400), args, ROWS, optimizers=optimizers, **given)
    run = DistillTrainer(
        tiny_model("llama", 400), tiny_model("gemma2", 400), args, ROWS, **given | {"peft_config": None}
    )
    before = {name: one.clone() for name, one in run.model.named_parameters()}
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    run.train()
    assert not any(torch.equal(before[name], one) for name, one in run.model.named_parameters())


def test_the_saved_student_stops_at_the_end_token_of_its_template(tmp_path):
    """A base model's end token is often not the one that a chat template writes after an answer."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<|im_end|>'")
    student = tiny_model("llama", len(tokenizer))
    args = DistillConfig(
        output_dir=str(tmp_path), use_cpu=True, template="chat", method="sft", max_steps=1, save_strategy="no"
    )
    run = DistillTrainer(student, None, args, ROWS, processing_class=tokenizer)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    ends = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    assert run.student_encoder.end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {run.student_encoder.end_token_id, tokenizer.eos_token_id} <= set(ends)


def test_rows_that_were_encoded_for_other_models_are_refused(tmp_path):
    """Ids of another tokenizer would train on other text, without an error."""
    encoders = [TextEncoder(make(), "plain") for make in (byte_bpe, bpe_byte_fallback)]
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True, template="plain", eval_rouge_l=True)
    pairs = encode_pairs(load_examples(ROWS), *encoders)
    sides = {"processing_class": encoders[0].tokenizer, "teacher_processing_class": encoders[1].tokenizer}
    models = [tiny_model("llama", len(one.tokenizer)) for one in encoders]
    DistillTrainer(*models, args, pairs, **sides)
    with pytest.raises(UserError, match="eval_dataset is encoded already, so its prompts cannot be answered"):
        DistillTrainer(*models, args, ROWS, pairs, **sides)
    swapped = {"processing_class": encoders[0].tokenizer, "teacher_processing_class": encoders[0].tokenizer}
    with pytest.raises(UserError, match="not encoded with the tokenizer of teacher 1: encode them again"):
        DistillTrainer(models[0], tiny_model("gemma2", 400), args, pairs, **swapped)
    two = {"processing_class": encoders[0].tokenizer, "teacher_processing_class": [encoders[1].tokenizer] * 2}
    teachers = [tiny_model("gemma2", len(encoders[1].tokenizer)) for _ in range(2)]
    with pytest.raises(UserError, match="encoded for a student and 1 teachers, but there are 2"):
        DistillTrainer(models[0], teachers, args, pairs, **two)


def test_the_model_of_the_trainer_points_to_the_student(tmp_path):
    """Idioms of other trainers, such as trainer.model.save_pretrained, name the way to the student."""
    run = trainer(tmp_path)
    assert not hasattr(run.model, "save_pretrained")
    with pytest.raises(
        AttributeError, match=r"has no generate: use trainer\.student\.generate, or trainer\.save_model"
    ):
        run.model.generate()
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        run.model.other()


def test_flash_attention_runs_in_half_precision(tmp_path, monkeypatch):
    """It takes neither float32 nor, mostly, a CPU: the checks before training use another function, and the rest autocast."""
    called = []

    def flash(module, query, key, value, attention_mask, **options):
        if query.dtype == torch.float32:  # as `flash_attention_forward` of transformers
            if not torch.is_autocast_enabled("cpu"):
                raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
            query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
        called.append(query.dtype)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash)
    masks = type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    monkeypatch.setitem(masks, "flash_stand_in", masks["sdpa"])
    monkeypatch.setattr("dwakd.training.trainer.check_student", lambda _: None)  # no package has this implementation
    tokenizers = byte_bpe(), bpe_byte_fallback()
    models = [tiny_model(kind, len(one)) for kind, one in zip(("llama", "qwen2"), tokenizers, strict=True)]
    for model in models:
        model.config._attn_implementation = "flash_stand_in"
    args = DistillConfig(
        output_dir=str(tmp_path), use_cpu=True, template="plain", max_steps=2, save_strategy="no", padding_free=True,
        method="alm", lmbda=0.5, max_new_tokens=4, eval_rouge_l=True, eval_max_new_tokens=4,
    )  # fmt: skip
    sides = {"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1]}
    run = DistillTrainer(*models, args, ROWS, ROWS[:2], **sides)
    run.train()
    assert math.isfinite(run.evaluate()["eval_rouge_l"])
    assert set(called) == {torch.bfloat16}


def test_missing_pieces_are_named(tmp_path):
    """A missing or wrong argument raises a UserError that names it."""
    student = tiny_model("llama", 400)
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="method dwa_kd needs a teacher"):
        DistillTrainer(student, None, args, ROWS, processing_class=byte_bpe())
    with pytest.raises(UserError, match="teacher_processing_class is missing"):
        DistillTrainer(student, tiny_model("gpt2"), args, ROWS, processing_class=byte_bpe())
    with pytest.raises(UserError, match="processing_class is missing"):
        DistillTrainer(student, tiny_model("gpt2"), args, ROWS)
    with pytest.raises(UserError, match=r"must be a dwakd\.DistillConfig"):
        checked_args(TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(UserError, match="dispatch_batches cannot be used"):
        checked_args(DistillConfig(str(tmp_path), use_cpu=True, accelerator_config={"dispatch_batches": True}))
    for options, message in (
        ({"fp16": True}, "fp16 has no effect without a GPU"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"lr_scheduler_type: .*; set training\.lr_scheduler_kwargs"),
        ({"optim": "adamw_8bit"}, r"training\.optim: .*bitsandbytes"),
    ):
        with pytest.raises(UserError, match=message):
            checked_args(DistillConfig(str(tmp_path), use_cpu=True, **options))
    with pytest.raises(UserError, match="share the parameter"):
        DistillTrainer(student, student, args, ROWS, processing_class=byte_bpe(), teacher_processing_class=byte_bpe())
    nothing = DistillTrainer(student, None, DistillConfig(output_dir=str(tmp_path), use_cpu=True, method="sft"), None,
                             processing_class=byte_bpe())  # fmt: skip
    with pytest.raises(UserError, match="give train_dataset"):
        nothing.train()
    for name, value, message in (
        ("learning_rate", "1e-3", "learning_rate must be a number, got '1e-3'"),
        ("loss_options", "a", "loss_options is not valid JSON"),
    ):
        wrong = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
        setattr(wrong, name, value)  # the type checker refuses it in the constructor
        with pytest.raises(UserError, match=message):
            wrong.__post_init__()
    short = tiny_model("llama", 400, max_position_embeddings=64)
    with pytest.raises(UserError, match="has only 64 positions"):
        DistillTrainer(
            short, None, DistillConfig(output_dir=str(tmp_path), use_cpu=True, method="sft"), ROWS, None, byte_bpe()
        )


def test_tokenizer_without_padding_token(tmp_path):
    """If a tokenizer has no padding token, as those of many base models, the end-of-sequence token is used."""
    tokenizer = byte_bpe()
    tokenizer.pad_token = None
    args = {"method": "sft", "max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    run = DistillTrainer(
        tiny_model("llama", len(tokenizer)),
        None,
        DistillConfig(output_dir=str(tmp_path), **args),
        ROWS,
        None,
        tokenizer,
    )
    run.train()
    assert run.processing_class.pad_token_id == tokenizer.eos_token_id


def test_logs_are_json(tmp_path):
    """The log history contains plain numbers, so that the trainer state can be saved as JSON."""
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]


def test_training_starts_without_warnings_on_special_tokens(tmp_path, caplog, recwarn):
    """No warning on special tokens is shown, because the user cannot act on it."""
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        trainer(tmp_path, lora=True, max_steps=1).train()
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "PAD/BOS/EOS" not in caplog.text
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]


def test_a_checkpoint_of_another_method_or_student_is_refused(tmp_path):
    """In Python, nothing compares the options of a resumed run; the error must not be that of the first tensor."""
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    for options in ({"method": "sft"}, {"lora": True}, {"student": "gpt2"}):
        with pytest.raises(UserError, match=r"another student or method|are not those of the student"):
            trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("method", ["dwa_kd", "min_ed", "gold", "sra"])
def test_a_special_token_without_an_embedding(method, tmp_path):
    """Gemma 3's tokenizer has a token for images, for which its text models have no embedding: rows must not contain it."""
    tokenizers = byte_bpe(), bpe_byte_fallback()
    models = tiny_model("llama", len(tokenizers[0]), seed=1), tiny_model("gemma2", len(tokenizers[1]), seed=2)
    for tokenizer in tokenizers:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    args = DistillConfig(
        output_dir=str(tmp_path), method=method, max_steps=1, template="plain", use_cpu=True, save_strategy="no"
    )
    sides = {"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1]}
    DistillTrainer(models[0], models[1], args, ROWS, **sides).train()
    spelled = [*ROWS, {"prompt": "What is <image>?", "response": "A picture."}]
    problem = f"row {len(ROWS)}.*: the prompt contains '<image>', a special token of .* has no embedding: remove it"
    with pytest.raises(UserError, match=problem):
        DistillTrainer(models[0], models[1], args, spelled, **sides)
    with pytest.raises(UserError, match=problem):
        DistillTrainer(models[0], models[1], args, ROWS, spelled, compute_metrics=lambda _: {}, **sides)
    args.special_tokens_in_prompts = "text"
    DistillTrainer(models[0], models[1], args, spelled, **sides)
    tokenizers[0].chat_template = "<image>{{ messages }}"
    with pytest.raises(UserError, match="has token ids up to 400, but the model has 400 embeddings"):
        DistillTrainer(models[0], models[1], args, ROWS, **sides)
