"""A server with OpenAI's completions API that gives the log-probabilities of a prompt, computed by a tiny teacher."""

from typing import Any

import torch

from tests.answers.server import Server


class LogProbServer(Server):
    """Answers as vLLM does, and as llama-cpp-python does for text. The name of the model says what goes wrong."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(answering=False)
        self.model, self.tokenizer, self.text_only, self.repeat = model, tokenizer, False, 1

    def status(self, body, authorization) -> int:
        if body["model"] == "flaky" and self.failures < 2:
            self.failures += 1
            return 429
        return 400 if self.text_only and isinstance(body["prompt"], list) else 200

    @torch.no_grad()
    def answer(self, body) -> dict[str, Any]:
        assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer(ids, add_special_tokens=False)["input_ids"] * self.repeat
        logits = self.model(torch.tensor([ids])).logits[0]
        values = [None, *logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
        texts = [self.tokenizer.decode([one]) for one in ids]
        if body["model"] == "other tokenizer":
            texts = [text[::-1] for text in texts]
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        if body.get("prompt_logprobs"):
            best = logits.argmax(-1).tolist()
            entries = [
                {str(other): {"logprob": -0.1}, str(one): {"logprob": value, "rank": 3, "decoded_token": text}}
                for one, value, text, other in zip(ids, values, texts, [0, *best], strict=False)
            ]
            choice["prompt_logprobs"] = [None, *entries[1:]]
        elif body.get("echo") and body["model"] != "silent":
            assert body["logprobs"] == 1
            skipped = int(isinstance(body["prompt"], str))  # llama-cpp-python leaves out the first token
            choice["logprobs"] = {
                "tokens": [*texts[skipped:], "x"],
                "token_logprobs": [None, *values[skipped + 1 :], -0.5],
                "text_offset": [0] * (len(ids) + 1 - skipped),
                "top_logprobs": [None] * (len(ids) + 1 - skipped),
            }
        usage = {"completion_tokens": 1, "prompt_tokens": len(ids), "total_tokens": len(ids) + 1}
        about = {"id": "1", "object": "text_completion", "created": 1, "model": body["model"]}
        return {**about, "choices": [choice], "usage": usage}
