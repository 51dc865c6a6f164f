"""A fake judge with the chat completions of OpenAI's API. The name of its model says how it judges."""

import json
import re
import time
from pathlib import Path
from typing import Any

from tests.answers.server import Server

_PARTS = re.compile(r"\[Question\]\n(.*)\n\n\[Answer of A\]\n(.*)\n\n\[Answer of B\]\n(.*)\n\n\[Task\]", re.DOTALL)


class JudgeServer(Server):
    """Judges: `longer` prefers the longer answer, `first` the first one; `mute` never and `late` at once has no verdict."""

    longest = 100_000

    def __init__(self) -> None:
        super().__init__(answering=False)
        self.times: list[float] = []

    def status(self, body, authorization) -> int:
        self.times.append(time.monotonic())
        if (body["model"] == "strict" and "max_tokens" in body) or "forbidden" in body["messages"][0]["content"]:
            return 400
        return super().status(body, authorization)

    def answer(self, body) -> dict[str, Any]:
        prompt = body["messages"][0]["content"]
        text = {"first": "A", "mute": "I like both."}.get(body["model"])
        if body["model"] == "late" and self.prompts().count(prompt) == 1:
            text = "Let me think."
        if text is None:
            found = _PARTS.search(prompt)
            assert found is not None
            _, first, second = found.groups()
            text = "Tied" if len(first) == len(second) else "**A**" if len(first) > len(second) else "B."
        if body["model"] == "slow":
            time.sleep(0.05)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"completion_tokens": 1, "prompt_tokens": 9, "total_tokens": 10}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": f"{body['model']}-2026"}
        return {**about, "choices": [choice], "usage": usage}

    def prompts(self) -> list[str]:
        """Return the prompts of all requests so far."""
        return [body["messages"][0]["content"] for body in self.requests]


def write_answers(path: Path, answers: list[str], *, first: int = 0, **columns: Any) -> Path:
    """Write answers to the questions from number `first`, in the format of `dwakd eval` with a sampled pass of seed 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"row": n, "seed": seed, "temperature": seed and 1.0, "prompt": f"Question {n}?", "answer": text, **columns}
        for seed, texts in ((10, ["sampled answer"] * len(answers)), (None, answers))
        for n, text in enumerate(texts, first)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
