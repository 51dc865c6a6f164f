"""A small server with the chat completions of OpenAI's API, which answers with a tiny teacher or fails as asked."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dwakd import load_examples
from dwakd.answers import GenerateSection
from dwakd.answers.local import LocalTeacher
from dwakd.data.encoding import TextEncoder
from tests.answers.builders import TOKENIZER, teacher

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
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.failures = threading.Lock(), 0
        self.requests: list[dict[str, Any]] = []
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
        return 400 if sum(len(turn["content"]) for turn in body["messages"]) > LONGEST else 200

    def answer(self, body) -> dict[str, Any]:
        options = GenerateSection(
            **{name: body[name] for name in ("temperature", "top_p", "seed")}, max_new_tokens=body["max_tokens"]
        )
        examples = load_examples([{"messages": body["messages"]}], need_response=False)
        ((answer,),) = LocalTeacher(self.model, self.encoder, options).answer(0, examples, lambda count: None)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}}
        choice["finish_reason"] = "length" if answer.finish == "cut" else "stop"
        if body.get("logprobs") and body["model"] != "silent":
            choice["logprobs"] = {"content": [{"token": "x", "logprob": answer.log_prob, "top_logprobs": []}]}
        usage = {"completion_tokens": answer.num_tokens, "prompt_tokens": 1, "total_tokens": 1}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return {**about, "choices": [choice], "usage": usage}


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Run a server on a free port inside a `with` block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
