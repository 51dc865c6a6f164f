"""A server with the API of OpenAI that answers prompts: vLLM, SGLang, the server of llama.cpp, or a service."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from dwakd.answers.answers import Answer, Finish
from dwakd.answers.local import Advance
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.data.turns import sent_turn
from dwakd.errors import UserError, reason_of
from dwakd.recipe.sections import EndpointSection, GenerateSection

KEY_VARIABLE = "OPENAI_API_KEY"
_RETRIES = 5  # with exponential backoff, for errors of the network, of the server, and too many requests
_DIGITS = 4
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, as in an answer that was cut; no file can hold it
_FINISHES: dict[str, Finish] = {
    "length": "cut",
    **dict.fromkeys(("content_filter", "tool_calls", "function_call", "error"), "refused"),
}
"""What it means that a server ends an answer for one of these reasons, and not at its end token."""
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class OptionNames(NamedTuple):
    """What a user calls the options of an endpoint, for messages, and the extra that installs its client."""

    endpoint: str
    model: str
    base_url: str
    batch_size: str
    extra: str


_GENERATE = OptionNames(
    "generate.endpoint", "generate.endpoint.model", "generate.endpoint.base_url", "generate.batch_size", "openai"
)


class RefusedError(Exception):
    """The server refuses one request, for example because its prompt is too long. Others may be accepted."""


class Endpoint:
    """The chat completions and the completions of a server. Its key is read from the variable OPENAI_API_KEY.

    Args:
        section: address and model.
        names: the names of options in messages.

    Raises:
        UserError: the package openai is not installed.
    """

    def __init__(self, section: EndpointSection, names: OptionNames) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                f"{names.endpoint} requires the package openai; install it with pip install 'dwakd[{names.extra}]'"
            ) from None
        self.name = f"the endpoint {section.base_url}"
        self._section, self._names, self._openai = section, names, openai
        key = os.environ.get(KEY_VARIABLE, "none")  # a local server needs no key
        self._client = openai.OpenAI(base_url=section.base_url, api_key=key, max_retries=_RETRIES)

    def complete(self, **request: Any) -> Any:
        """Return the completion of openai for a request without its model, with at least one choice.

        A request with a `prompt` is one of completions, and others are of chat completions.

        Raises:
            RefusedError: the server refuses this request; the message is its reason.
            UserError: any other error, which other requests would have, too.
        """
        openai = self._openai
        try:
            json.dumps(request, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise RefusedError(f"it cannot be sent as JSON: {reason_of(error):.300}") from error
        try:
            api = self._client.completions if "prompt" in request else self._client.chat.completions
            completion: Any = api.create(model=self._section.model, **request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"{reason_of(error):.300}") from error
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        if not getattr(completion, "choices", None):
            raise UserError(f"{self.name} sent no chat completion; correct {self._names.base_url}")
        return completion

    def _failure(self, error: Exception) -> UserError:
        """Return the sentence for an error that another prompt would have, too."""
        openai, names, kept = self._openai, self._names, "answers so far are kept"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return UserError(f"{self.name} refuses the key; set the variable {KEY_VARIABLE}")
        if isinstance(error, openai.NotFoundError):
            fix = f"correct {names.model} or {names.base_url} (which often ends in /v1)"
            return UserError(f"{self.name} does not know the model {self._section.model} or the address; {fix}")
        if isinstance(error, openai.RateLimitError):
            fix = f"lower {names.batch_size}, or start the command again later: {kept}"
            return UserError(f"{self.name} still limits the rate of requests after {_RETRIES} retries; {fix}")
        if isinstance(error, openai.APIConnectionError):
            fix = f"start the server, or correct {names.base_url}: {kept}"
            return UserError(f"{self.name} cannot be reached ({reason_of(error.__cause__ or error):.200}); {fix}")
        return UserError(f"{self.name} failed ({reason_of(error):.300}); start the command again: {kept}")


def in_parallel(
    function: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    batch_size: int,
    stop: Callable[[], None] | None = None,
) -> list[ResultT]:
    """Call a function for all items, `batch_size` at a time. After an error, call `stop` and start no further call."""
    with ThreadPoolExecutor(batch_size) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if stop is not None:
                stop()
            raise


class EndpointTeacher:
    """A model behind the chat completions of a server, which applies its own chat template, or behind its completions.

    Args:
        section: address and model.
        options: how to decode; `batch_size` requests are sent at a time.
        template: how a row becomes a prompt, for completions.
        skip: whether prompts that the server refuses are left out, instead of an error.

    Raises:
        UserError: the package openai is not installed, or the template is `chat` and `generate.api` is completions.
    """

    def __init__(
        self, section: EndpointSection, options: GenerateSection, template: str = "plain", *, skip: bool = False
    ) -> None:
        if options.api == "completions" and template == "chat":
            raise UserError(
                "generate.api: completions sends the text of data.template, which for chat only the server knows: use another "
                "data.template, or generate.api: chat"
            )
        self._endpoint, self._options, self._skip = Endpoint(section, _GENERATE), options, skip
        self._prompts = Prompts(template, None) if options.api == "completions" else None
        self._sources: list[str] = []

    def check(self, examples: Sequence[Example], source: str) -> None:
        """Note the source of these prompts, for messages; only the server knows which of them are too long."""
        self._sources += [source] * len(examples)

    def answer(self, first: int, examples: Sequence[Example], advance: Advance) -> list[list[Answer]]:
        """Return the samples of each prompt; `first` is the number of the first prompt among all prompts."""
        samples = range(self._options.samples)

        def one(work: tuple[int, Example, int]) -> Answer:
            answer = self._answer(*work)
            advance(1)
            return answer

        work = [(number, example, sample) for number, example in enumerate(examples, first) for sample in samples]
        answers = in_parallel(one, work, self._options.batch_size)
        return [answers[start : start + len(samples)] for start in range(0, len(answers), len(samples))]

    def _answer(self, number: int, example: Example, sample: int) -> Answer:
        try:
            request = self._request(example, sample)
        except UserError as error:  # the template cannot show the row
            if self._skip:
                return Answer("", 0, "refused", None)
            raise UserError(f"{self._sources[number]}, {error}") from error
        try:
            completion = self._endpoint.complete(**request)
        except RefusedError as error:
            if self._skip:
                return Answer("", 0, "refused", None)
            raise UserError(
                f"{self._sources[number]}, {example.place}: {self._endpoint.name} refuses the prompt ({error}); "
                "shorten or remove it, or set data.invalid_rows: skip"
            ) from error
        return self._read(completion)

    def _request(self, example: Example, sample: int) -> dict[str, Any]:
        """Return the arguments of a request; only servers with chat templates of open models read `extra_body`."""
        options = self._options
        request: dict[str, Any] = {
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed + sample,
        }
        if options.min_log_prob is not None:
            request["logprobs"] = 1 if self._prompts else True
        if self._prompts:
            return {**request, "prompt": self._prompts.render(example)}
        others = dict(example.options or {})
        request |= {"tools": others.pop("tools")} if "tools" in others else {}
        extra = {"documents": others.pop("documents")} if "documents" in others else {}
        extra |= {"chat_template_kwargs": others} if others else {}
        return {
            **request,
            **({"extra_body": extra} if extra else {}),
            "messages": [sent_turn(turn) for turn in example.turns],
        }

    def _read(self, completion: Any) -> Answer:
        """Convert a response of the server. An answer that was filtered or not completed is `refused`."""
        choice, usage = completion.choices[0], completion.usage
        finish = _FINISHES.get(choice.finish_reason, "end")
        log_prob = None
        if self._options.min_log_prob is not None and finish != "refused":
            found = choice.logprobs
            values = found and (found.token_logprobs if self._prompts else [one.logprob for one in found.content or ()])
            if not values:
                raise UserError(f"{self._endpoint.name} sends no log-probabilities; leave out generate.min_log_prob")
            log_prob = round(sum(values) / len(values), _DIGITS)
        count = None if usage is None else usage.completion_tokens
        text = ((choice.text if self._prompts else choice.message.content) or "").strip()
        text = _SURROGATE.sub("\ufffd", text)
        return Answer(text, count, finish, log_prob)
