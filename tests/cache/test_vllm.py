"""Test the cache that is built through vLLM's extraction of hidden states. vLLM itself was not run; see fake_vllm.py."""

import pytest
import torch

from dwakd import UserError
from dwakd.cache.store import Cache
from dwakd.training.teacher import CachedTeacher
from tests.cache import fake_vllm
from tests.cache.builders import save_teacher, trainer


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return a function that builds the cache of a saved teacher through the fake engine."""
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(fake_vllm.LLM, "change", None)

    def built(teacher, folder="cache", **options):
        online = trainer(tmp_path / "run", teacher)
        cached = CachedTeacher(tmp_path / folder, str(teacher), engine="vllm", **options)
        cached.prepare(online.encoders[1], online.args, {"train": online.train_dataset, "eval": None})
        return cached.cache

    return built


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "phi"])
def test_the_states_are_those_of_the_model_itself(family, build, tmp_path):
    """vLLM's states lack the final norm, with which the teacher would be another model; training accepts the cache."""
    teacher = save_teacher(tmp_path / "teacher", family)
    cache = build(teacher)
    plain = trainer(tmp_path / "plain", teacher, cache=tmp_path / "expected")
    expected: Cache = plain.teachers[0].cache
    places = range(len(expected.index.keys))
    torch.testing.assert_close(cache.read(places), expected.read(places), atol=1e-5, rtol=1e-5)
    assert cache.manifest.digests == expected.manifest.digests
    assert trainer(tmp_path / "opened", teacher, cache=tmp_path / "cache").teachers[0].cache.read([3]).shape


def test_bfloat16(build, tmp_path):
    """The log-probabilities of a teacher in bfloat16 agree less well, which must not refuse the cache."""
    assert build(save_teacher(tmp_path / "teacher", "llama"), dtype=torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zeros", "states that are zero, infinite or NaN"),
        ("nan", "states that are zero, infinite or NaN"),
        ("short", "states for the .* tokens of a row"),
        ("tokens", "or other tokens"),
        ("normed", "whose log-probabilities differ by"),
        ("shifted", "whose log-probabilities differ by"),
    ],
)
def test_states_that_are_wrong_are_refused(name, message, build, tmp_path, monkeypatch):
    """vLLM's prefix cache once gave states of other requests, its hybrid models NaN, and new pages zeros."""

    def change(data):
        states = data["hidden_states"]
        changed = {
            "zeros": lambda: torch.cat([states[:-3], 0 * states[-3:]]),
            "nan": lambda: states.index_fill(0, torch.tensor([len(states) - 3]), torch.nan),
            "short": lambda: states[:-1].clone(),
            "normed": lambda: torch.nn.functional.normalize(states, dim=-1) * 3 + 1,
            "shifted": lambda: states.roll(1, 0),
        }
        if name == "tokens":
            return data | {"token_ids": data["token_ids"].flip(0)}
        return data | {"hidden_states": changed[name]().contiguous()}

    monkeypatch.setattr(fake_vllm.LLM, "change", staticmethod(change))
    with pytest.raises(UserError, match=message):
        build(save_teacher(tmp_path / "teacher", "llama"))
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_what_vllm_cannot_do_is_one_sentence(build, tmp_path, monkeypatch):
    """A user without vLLM learns what to install, and an adapter cannot be used."""
    teacher = save_teacher(tmp_path / "teacher", "llama")
    monkeypatch.setitem(fake_vllm.sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"requires the package vllm, 0\.22 or newer"):
        build(teacher)
    with pytest.raises(UserError, match=r"without teacher\.adapter and teacher\.quantization_config"):
        build(teacher, quantization_config={"load_in_4bit": True})
