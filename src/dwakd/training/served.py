"""A teacher on a server, which gives log-probabilities of the response's tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.answers.endpoint import Endpoint, OptionNames, RefusedError, in_parallel
from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.cache.fingerprint import DATE, json_digest, row_key
from dwakd.cache.manifest import keyed_sides
from dwakd.cache.store import CacheRequest
from dwakd.data.encoded import EncodedSide
from dwakd.data.encoding import TextEncoder
from dwakd.data.special_tokens import needed_embeddings
from dwakd.data.token_bytes import TokenBytes
from dwakd.errors import UserError
from dwakd.folders import cache_folder
from dwakd.losses.options import refuse_served
from dwakd.recipe.sections import EndpointSection, TeacherSection
from dwakd.recipe.training import DistillConfig
from dwakd.training.teacher import CachedTeacher, Sets

_NAMES = OptionNames("teacher.url", "teacher.served_model", "teacher.url", "teacher.batch_size", "openai")


class ServedTeacher(CachedTeacher):
    """Get the log-probabilities of the response's tokens from a server with the completions API of OpenAI.

    The tokens are those of the teacher's own tokenizer. `prepare` asks for all rows of the data sets and stores the results
    as a cache, so that no row is asked for twice. During training, only answers of the student (`training.lmbda`) and rows
    of other data sets are asked for.

    Args:
        section: `url` and the other options of a served teacher, such as `TeacherSection(url=..., model=...)`.
        tokenizer: tokenizer of the teacher; by default the one that belongs to `section.model`.
    """

    def __init__(self, section: TeacherSection, tokenizer: Any | None = None) -> None:
        loading: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
        super().__init__(section.cache or cache_folder() / "served", section.model, tokenizer=tokenizer, **loading)
        self._section, self._places = section, dict[bytes, int]()
        self.table = torch.empty(needed_embeddings(self.tokenizer), 0)
        self.head = OutputHead(self.table)

    @cached_property
    def client(self) -> ServedEngine:
        """The client of the server."""
        return ServedEngine(self._section, self.tokenizer)

    def check_method(self, args: DistillConfig) -> None:
        refuse_served(args.method_options)
        if args.lmbda and self._section.api == "echo_text":
            raise UserError(
                "training.lmbda cannot be used with teacher.api: echo_text, because the server may split the student's "
                "answers into other tokens: use a server that takes token ids"
            )

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets, *, repair: bool = False) -> None:
        """Ask for the rows of these data sets that are not stored; for those to train on unless the student answers all."""
        if self._request(encoder, args, sets).sets:  # chooses the folder
            super().prepare(encoder, args, sets, repair=repair)
            self.find_place, self._places = None, self.cache.index.places

    def _request(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> CacheRequest:
        request = super()._request(encoder, args, sets)
        printed = request.fingerprint | {DATE: encoder.printed_date or ""}
        request = replace(request, fingerprint=printed)
        if args.lmbda == 1:
            request = replace(request, sets={role: own for role, own in request.sets.items() if role != "train"})
        if self._section.cache is None:
            keys = sorted(key.hex() for key, _ in keyed_sides(*request.sets.values()))
            self.folder = cache_folder() / "served" / json_digest([request.fingerprint, keys])[:32]
        return request

    def _identity(self) -> dict[str, Any]:
        name = self._section.served_model or self._section.model
        return {"teacher": f"{name} on a server", "adapter": None, "dtype": "log-probabilities"}

    def _engine(self, args: DistillConfig, sets: Sets) -> ServedEngine:
        return self.client

    def side(self, tokens: TokenBatch) -> ModelSide:
        """Return the teacher's side of a batch, with `target_log_probs` and without hidden states."""
        self.head, self.table = self.head.to(tokens.input_ids.device), self.table.to(tokens.input_ids.device)
        side = super().side(tokens)
        return replace(side, hidden=side.hidden[:, :0], target_log_probs=side.hidden[:, 0])

    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], None]:
        """Return the log-probability of each target token, stored or from the server."""
        columns = tokens.input_ids.tolist(), tokens.target_ids.tolist(), tokens.num_tokens, tokens.num_rows
        sides = [_encoded([*ids[:n], own[n - 1]], rows) for ids, own, n, rows in zip(*columns, strict=True)]
        places = [self._places.get(row_key(side.ids, side.num_prompt)) for side in sides]
        unknown = [side for side, place in zip(sides, places, strict=True) if place is None]
        asked = iter(self.client.states(unknown) if unknown else ())
        found = [next(asked) if place is None else self.cache.read([place]) for place in places]
        return torch.cat(found).to(tokens.input_ids.device), None


def _encoded(ids: list[int], num_rows: int) -> EncodedSide:
    return EncodedSide(np.array(ids, dtype=np.int32), len(ids) - num_rows, np.zeros(num_rows, dtype=np.int32))


class ServedEngine:
    """Ask a server for the log-probabilities of the response's tokens.

    With the option `api`, `echo` sends token ids with `echo` and `logprobs`, `prompt_logprobs` sends token ids with this
    parameter of vLLM, and `echo_text` sends text with `echo` and `logprobs`.

    Raises:
        UserError: the package openai is not installed.
    """

    width, chunk_tokens = 1, 1 << 16

    def __init__(self, section: TeacherSection, tokenizer: Any) -> None:
        self.table = torch.empty(needed_embeddings(tokenizer), 0)
        self.head, self._section = OutputHead(self.table), section
        server = EndpointSection(base_url=section.url or "", model=section.served_model or section.model)
        self._endpoint = Endpoint(server, _NAMES)
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)

    def states(self, sides: Sequence[EncodedSide]) -> list[Float[Tensor, "tokens 1"]]:
        """Return the log-probabilities of the response's tokens of each row."""
        return in_parallel(self._ask, sides, self._section.batch_size)

    def _ask(self, side: EncodedSide) -> Float[Tensor, "tokens 1"]:
        ids, name = side.ids.tolist(), self._endpoint.name
        prompt = self._text(ids) if self._section.api == "echo_text" else ids
        by_id = self._section.api == "prompt_logprobs"
        how = {"extra_body": {"prompt_logprobs": 1}} if by_id else {"echo": True, "logprobs": 1}
        try:  # max_tokens: 0 means no limit to the server of llama-cpp-python
            completion = self._endpoint.complete(prompt=prompt, max_tokens=1, temperature=0.0, seed=0, **how)
        except RefusedError as error:
            fix = "lower data.max_length, or set teacher.api: echo_text if the server takes no token ids"
            raise UserError(f"{name} refuses a row of {len(ids)} tokens ({error}); {fix}") from error
        read = ids[side.num_prompt :]
        values, texts = zip(*(_by_id(completion, ids) if by_id else _echoed(completion))[-len(read) :], strict=True)
        if len(values) < len(read) or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            fix = "set teacher.api to what the server supports, or use a server such as vLLM"
            raise UserError(
                f"{name} sends no log-probabilities of the prompt with teacher.api: {self._section.api}; {fix}"
            )
        self._check(completion, prompt, ids, dict(zip(read, texts, strict=True)))
        return torch.tensor(values, dtype=torch.float32)[:, None]

    def _text(self, ids: list[int]) -> str:
        """Return the text of tokens without a leading beginning-of-sequence token, which the server adds."""
        ids = ids[1:] if ids[0] == self._tokenizer.bos_token_id else ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _check(self, completion: Any, prompt: Any, ids: list[int], texts: dict[int, str | None]) -> None:
        """Raise UserError if the server has read other tokens; it may put one before a text."""
        name, usage = f"{self._endpoint.name} reads", completion.usage
        added = usage.prompt_tokens - len(ids) if usage is not None else 0
        if added not in ((-1, 0, 1) if isinstance(prompt, str) else (0,)):
            fix = "correct teacher.model, or use a server that takes token ids"
            raise UserError(f"{name} {usage.prompt_tokens} tokens where teacher.model has {len(ids)}; {fix}")
        for token_id, text in texts.items():
            own = self._bytes[token_id].strip()
            if own and own.isascii() and (text or "").strip(" \t\n▁Ġ") not in ("", own.decode()):
                fix = "teacher.model must have the tokenizer of the served model"
                raise UserError(f"{name} {text!r} where teacher.model has the token {own.decode()!r}; {fix}")


def _echoed(completion: Any) -> list[tuple[Any, str | None]]:
    """Return log-probability and text of the prompt's tokens; some servers leave out the first one."""
    sent, usage = completion.choices[0].logprobs, completion.usage
    found = list(zip(sent.token_logprobs or (), sent.tokens or (), strict=False)) if sent else []
    return found[: len(found) - (1 if usage is None else usage.completion_tokens)] or [(None, None)]


def _by_id(completion: Any, ids: list[int]) -> list[tuple[Any, str | None]]:
    """Return log-probability and text of the prompt's tokens from vLLM's list of alternatives by token id."""
    sent = getattr(completion.choices[0], "prompt_logprobs", None) or [None]
    entries = [(entry or {}).get(str(token_id), {}) for entry, token_id in zip(sent, ids, strict=False)]
    return [(entry.get("logprob"), entry.get("decoded_token")) for entry in entries]
