"""Test that training from a cache gives the same student as training with the online teacher."""

import gc

import pytest
import torch
from transformers.utils import chat_template_utils as clock

from dwakd import UserError
from dwakd.models.head import embedding_table, output_head
from dwakd.models.loading import load_causal_lm
from dwakd.models.rows import final_hidden, response_hidden
from dwakd.recipe.recipe import load_recipe
from dwakd.training.run import check_options
from dwakd.training.teacher import CachedTeacher, OnlineTeacher
from tests.builders import FAMILIES, tiny_model
from tests.cache.builders import LONG, STUDENT, TEACHER, save_teacher, trainer
from tests.training.builders import assert_same, weights

EVAL = [{"prompt": "Name a colour.", "response": "Any colour will do."}, *LONG[3:6]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return a Llama teacher, whose attention rounds differently for other shapes, unlike that of Gemma 2."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "llama", "llama")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen2"])
def test_hidden_states_do_not_depend_on_other_sequences(family):
    """The hidden states of a sequence do not depend on the other sequences of its batch."""
    model = tiny_model(family)
    lengths = [3, 31, 32, 33, 64, 65, 90, 128, 7, 40]
    sequences = [torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    whole = response_hidden(model, sequences, [2] * len(lengths))
    for members in ([0], [5], [8, 0, 3], [9, 4], [2, 1, 0, 8, 7]):
        part = response_hidden(model, [sequences[m] for m in members], [2] * len(members))
        for member, rows in zip(members, part, strict=True):
            assert torch.equal(rows, whole[member])
    for sequence, rows in zip(sequences, whole, strict=True):
        plain = final_hidden(model, sequence[None], torch.ones_like(sequence[None]))[0, -2:].detach()
        torch.testing.assert_close(rows, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dwa_kd", {}),
        ("dwa_kd", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}),
        ("dskd", {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1}),
        ("dwa_kd", {"eval_rows": EVAL, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}),
    ],
)
def test_cached_and_online_runs_are_bit_equal(tmp_path, teacher, method, options):
    """A run from a cache has the same weights to the last bit as a run with the online teacher."""
    online = trainer(tmp_path / "online", teacher, method=method, **options)
    built = trainer(tmp_path / "built", teacher, cache=tmp_path / "cache", method=method, **options)
    opened = trainer(tmp_path / "opened", teacher, cache=tmp_path / "cache", method=method, **options)
    for run in (online, built, opened):
        run.train()
    for run in (built, opened):
        assert_same(weights(run), weights(online))
        for got, expected in zip(run.state.log_history, online.state.log_history, strict=True):
            timings = {name for name in expected if "runtime" in name or "per_second" in name}
            assert {k: v for k, v in got.items() if k not in timings} == {
                k: v for k, v in expected.items() if k not in timings
            }


def test_a_cached_run_resumes(tmp_path, teacher):
    """A resumed run reads the hidden states of the rows that follow the skipped ones."""
    options = {"cache": tmp_path / "cache", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "run", teacher, **options)
    whole.train()
    resumed = trainer(tmp_path / "run", teacher, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_rows(tmp_path, family):
    """The cached side equals the online side for tied embeddings, head biases, logit scales and soft caps."""
    folder = save_teacher(tmp_path / "teacher", family)
    if family == "opt_projected":
        pytest.skip("embeddings narrower than hidden states are for students")
    run = trainer(tmp_path / "run", folder, cache=tmp_path / "cache", method="dskd")
    model = load_causal_lm(str(folder))
    batch = run.data_collator([run.train_dataset[n] for n in (4, 0, 7)])
    got, expected = (teacher.side(*batch.teachers) for teacher in (run.teachers[0], OnlineTeacher(model)))
    for name in ("hidden", "input_embeddings", "target_embeddings", "target_ids", "lengths", "byte_ends"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert torch.equal(got.head.logits(got.hidden), expected.head.logits(expected.hidden))
    tied = embedding_table(model).data_ptr() == output_head(model).weight.data_ptr()
    assert (run.teachers[0].table is run.teachers[0].head.weight) == tied


def test_no_layer_of_the_teacher_is_loaded(tmp_path, monkeypatch):
    """Training from a cache does not load the teacher's layers, so that a teacher can be larger than the memory."""
    folder = save_teacher(tmp_path / "teacher", intermediate_size=1009)  # only the layers have this width
    trainer(tmp_path / "first", folder, cache=tmp_path / "cache")

    def loaded(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd.training.teacher.load_causal_lm", loaded)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    run = trainer(tmp_path / "second", folder, cache=tmp_path / "cache")
    run.train()
    gc.collect()
    held = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and 1009 in item.shape]
    assert not held
    assert not any(isinstance(value, torch.nn.Module) for value in vars(run.teachers[0]).values())


def test_half_precision_stores_half(tmp_path, teacher):
    """Hidden states are rounded only with `cache_dtype`. Those of a bfloat16 teacher are stored exactly."""
    sets = {}
    for name, dtype, stored in (("a", torch.float32, torch.bfloat16), ("b", torch.bfloat16, None)):
        cached = CachedTeacher(tmp_path / name, str(teacher), dtype=dtype, cache_dtype=stored)
        run = trainer(tmp_path / "run", teacher)
        cached.prepare(run.encoders[1], run.args, {"train": run.train_dataset, "eval": None})
        assert cached.cache.dtype is torch.bfloat16
        places = [5, 2]
        sets[name] = cached.cache.read(places)
        assert cached.head.weight.dtype is dtype
    torch.testing.assert_close(sets["a"].float(), sets["b"].float(), atol=0.2, rtol=0.1)
    wrong = CachedTeacher(tmp_path / "a", str(teacher), cache_dtype=torch.float32, tokenizer=TEACHER)
    with pytest.raises(UserError, match=r"teacher\.cache_dtype is 'bfloat16' in the cache and 'float32' here"):
        wrong.prepare(run.encoders[1], run.args, {"train": run.train_dataset, "eval": None})


def test_a_loaded_teacher_and_a_foreign_set_are_refused(tmp_path, teacher):
    """A teacher without a name and a data set that the cache does not contain are refused."""
    with pytest.raises(UserError, match="by name"):
        CachedTeacher(tmp_path / "cache", tiny_model("gemma2"))
    run = trainer(tmp_path / "run", teacher, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="does not contain row 0"):
        run.evaluate(EVAL)


def test_methods_that_read_attention_cannot_use_a_cache(tmp_path, teacher):
    """Methods that read attention refuse a cache before it is built."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"student: {{model: x}}\nteacher: {{model: x, cache: {tmp_path / 'cache'}}}\n"
        "data: {train: x.jsonl}\nloss: {method: sra}\ntraining: {use_cpu: true}\n"
    )
    message = r"method sra reads the teacher's attention.* set loss\.span_weights=uniform"
    with pytest.raises(UserError, match=message):
        check_options(load_recipe(recipe, []), "unused")
    check_options(load_recipe(recipe, ["loss.span_weights=uniform"]), "unused")
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", teacher, cache=tmp_path / "cache", method="sra")
    assert not (tmp_path / "cache").exists()


def test_a_cache_can_be_used_on_another_day(tmp_path, monkeypatch):
    """The date of the chat template is stored in the cache, which can therefore be used on other days."""
    template = (
        "{{ strftime_now('%A %d %B %Y') }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    for tokenizer in (STUDENT, TEACHER):
        monkeypatch.setattr(tokenizer, "chat_template", template)
    folder = save_teacher(tmp_path / "teacher", "llama")
    options = {"cache": tmp_path / "cache", "template": "chat", "max_length": 128, "max_prompt_length": 112}
    options |= {"invalid_rows": "skip"}
    first = trainer(tmp_path / "first", folder, **options)
    real = clock.datetime
    monkeypatch.setattr(clock, "datetime", type("Later", (), {"now": staticmethod(lambda: real(2031, 5, 6))}))
    (tmp_path / "cache" / "shard-00003.safetensors").unlink()
    later = trainer(tmp_path / "later", folder, **options)
    for one, other in zip(first.train_dataset.rows, later.train_dataset.rows, strict=True):
        assert one.text == other.text
        assert all(
            (a.ids == b.ids).all() for a, b in ((one.student, other.student), (one.teachers[0], other.teachers[0]))
        )
    fresh = trainer(tmp_path / "online", folder, **{**options, "cache": None})
    assert fresh.student_encoder.printed_date == "2031-05-06"
    cached = CachedTeacher(tmp_path / "cache", str(folder))
    assert cached.date == first.student_encoder.printed_date
    cached.check(later.encoders[1], later.args, {"train": later.train_dataset, "eval": None})
    with pytest.raises(UserError, match="date for chat templates"):
        cached.check(fresh.encoders[1], fresh.args, {"train": fresh.train_dataset, "eval": None})
