"""Ask a judge to compare the answers of two runs, continue after an interruption, and write the results."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from dwakd.answers.endpoint import Endpoint, OptionNames, RefusedError, in_parallel
from dwakd.cache.fingerprint import json_digest
from dwakd.errors import UserError, explained
from dwakd.evaluation.generate import progress_bar
from dwakd.evaluation.report import check_overwrite
from dwakd.folders import alone_in, check_output_folder, write_json
from dwakd.judge.options import JudgeOptions
from dwakd.judge.pairs import Pair, read_pairs
from dwakd.judge.prompts import fill, read_prompt, read_verdict
from dwakd.judge.report import judge_table, write_plot
from dwakd.judge.statistics import summarise
from dwakd.recipe.files import apply_override
from dwakd.recipe.sections import EndpointSection

_NAMES = OptionNames("dwakd judge", "--model", "--base-url", "--batch-size", "judge")
_ATTEMPTS = 2
_BYTES_PER_TOKEN = 4  # about, in any language
_LIMITS = {"max_tokens", "max_completion_tokens"}
_COSTLY = 1.0  # in the currency of the prices


class Judge:
    """Asks an endpoint for votes. Each vote is added to a jsonl file as it arrives, and never asked for again."""

    def __init__(
        self, section: EndpointSection, request: dict[str, Any], path: Path, requests_per_minute: float | None
    ):
        self._endpoint, self._request, self._path = Endpoint(section, _NAMES), request, path
        self._identity, self._lock = {**section.model_dump(), **request}, threading.Lock()
        self._next_start, self._pause = 0.0, 60 / (requests_per_minute or float("inf"))
        self.stopped = threading.Event()
        """Set when no further request may be sent."""
        self.accepted = False
        """Whether the endpoint has accepted a request of this judge."""
        path.touch()
        *lines, rest = path.read_bytes().split(b"\n")
        with explained(f"{path} is damaged: remove the damaged lines, or choose another --output"):
            self._votes = {vote["key"]: vote for vote in map(json.loads, lines)}
        if rest:  # a process was killed while it wrote the last line
            os.truncate(path, path.stat().st_size - len(rest))

    def last(self, prompt: str) -> dict[str, Any]:
        """Return the last stored vote on a prompt. `score_of_first` is None if the reply had no verdict."""
        return self._votes.get(json_digest([self._identity, prompt]), {"score_of_first": None, "attempt": 0})

    def is_open(self, prompt: str) -> bool:
        """Return whether a prompt has no verdict yet and an attempt is left."""
        return self.last(prompt)["score_of_first"] is None and self.last(prompt)["attempt"] < _ATTEMPTS

    def ask(self, prompt: str, about: dict[str, Any]) -> None:
        """Send a prompt until it is no longer open, and store each vote together with `about`.

        Raises:
            UserError: the endpoint cannot be used, or refuses the request before it has accepted any.
        """
        while self.is_open(prompt):
            with self._lock:
                start = self._next_start = max(self._next_start + self._pause, time.monotonic())
            if self.stopped.wait(max(start - time.monotonic(), 0)):
                return
            vote = {**about, "score_of_first": None, "attempt": self.last(prompt)["attempt"] + 1}
            try:
                answer = self._endpoint.complete(
                    messages=[{"role": "user", "content": prompt}], extra_body=self._request
                )
            except RefusedError as error:
                if not self.accepted:
                    raise UserError(
                        f"{self._endpoint.name} refuses the request ({error}); change it with --request"
                    ) from error
                vote["refused"] = str(error)
            else:
                self.accepted, choice = True, answer.choices[0]
                reply, complete = choice.message.content or "", choice.finish_reason != "length"
                vote |= {
                    "score_of_first": read_verdict(reply, complete=complete),
                    "reply": reply,
                    "model": answer.model,
                }
                vote |= {name: getattr(answer.usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
            vote["key"] = json_digest([self._identity, prompt])
            with self._lock, explained(f"{self._path} cannot be written"), self._path.open("ab") as file:
                file.write(f"{json.dumps(vote)}\n".encode())
                file.flush()
                os.fsync(file.fileno())
                self._votes[vote["key"]] = vote


def judge_runs(
    places: Sequence[Path],
    section: EndpointSection,
    options: JudgeOptions,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    yes: bool = False,
) -> Group:
    """Compare the answers of two runs, write judge.json, verdicts.jsonl and judge.svg, and return the table to print.

    `overwrite` replaces results with another signature, and `yes` permits costs above 1.

    Raises:
        UserError: the answers or the endpoint cannot be used, the estimated cost is not permitted, or there are other
            results in the output folder.
    """
    template, pairs = read_prompt(options.prompt), read_pairs(places, options)
    request: dict[str, Any] = {"temperature": 0.1, "max_tokens": 64}
    for argument in options.request:
        if "=" not in argument:
            raise UserError(f"--request must look like max_tokens=512, got {argument!r}")
        apply_override(request, argument)
    request = {name: value for name, value in request.items() if value is not None}
    for name in _LIMITS & request.keys():
        if not isinstance(request[name], int):
            raise UserError(f"--request {name} must be a whole number, or null for no limit, got {request[name]!r:.80}")
    signature = {
        "judge": section.model_dump(),
        "prompt": json_digest(template),
        "request": request,
        **options.model_dump(include={"answers_seed", "limit", "seed", "both_orders", "length_control"}),
        "data": json_digest(pairs),
        "versions": {name: version(name) for name in ("dwakd", "openai")},
    }
    folder = output or Path("judge") / "-".join(place.resolve().name.removesuffix(".jsonl") for place in places)
    check_output_folder(folder)
    if not overwrite:
        check_overwrite(folder / "judge.json", signature)
    prompts = [_prompts(pair, template, both_orders=options.both_orders) for pair in pairs]
    with alone_in(folder):
        judge = Judge(section, request, folder / "verdicts.jsonl", options.requests_per_minute)
        missing = {
            prompt: {**pair._asdict(), "first": "AB"[first]}
            for pair, own in zip(pairs, prompts, strict=True)
            for first, prompt in own.items()
            if judge.is_open(prompt)
        }
        judge.accepted = any("reply" in judge.last(prompt) for own in prompts for prompt in own.values())
        if missing:
            _estimate(missing, request, options, yes=yes)
        with progress_bar(disable=not missing) as bar:
            task = bar.add_task("judging", total=len(missing))

            def ask(prompt: str) -> None:
                judge.ask(prompt, missing[prompt])
                bar.advance(task)

            in_parallel(ask, missing, options.batch_size, judge.stopped.set)
    sets: dict[str, list[tuple[Pair, list[float | None]]]] = {}
    for pair, own in zip(pairs, prompts, strict=True):
        scores = [(first, judge.last(prompt)["score_of_first"]) for first, prompt in own.items()]
        of_a = [None if score is None else abs(first - score) for first, score in scores]
        sets.setdefault(pair.test_set, []).append((pair, of_a))
    if len(sets) > 1:
        sets["all sets"] = [one for found in sets.values() for one in found]
    results = {name: summarise(found, length_control=options.length_control) for name, found in sets.items()}
    names = [str(place) for place in places]
    write_plot(names, results, folder / "judge.svg")
    write_json(folder / "judge.json", {"signature": signature, "a": names[0], "b": names[1], "results": results})
    where = Text(f"results, verdicts and plot: {folder}", no_wrap=True, overflow="ignore")
    return Group(judge_table(names, results), where)


def _prompts(pair: Pair, template: str, *, both_orders: bool) -> dict[int, str]:
    """Return the prompt of each vote on a pair, by whose answer is first; none if the pair needs no judge."""
    if not all(pair.answers) or len(set(pair.answers)) == 1:
        return {}
    orders = (pair.first, 1 - pair.first) if both_orders else (pair.first,)
    return {first: fill(template, pair.question, pair.answers[first], pair.answers[1 - first]) for first in orders}


def _estimate(prompts: Collection[str], request: dict[str, Any], options: JudgeOptions, *, yes: bool) -> None:
    """Print the number of requests and, if prices are given, the cost. Raise a UserError if it is high, unless `yes`."""
    tokens = sum(len(prompt.encode(errors="replace")) for prompt in prompts) // _BYTES_PER_TOKEN
    text, cost = f"{len(prompts):,} requests, about {tokens:,} prompt tokens", 0.0
    if options.price_in is not None or options.price_out is not None:
        most = len(prompts) * (request.get("max_tokens") or request.get("max_completion_tokens") or 0)
        cost = (tokens * (options.price_in or 0) + most * (options.price_out or 0)) / 1e6
        text += f" and at most {most:,} reply tokens, which cost about {cost:.2f}"
    text += "; a reply without a verdict is asked for once more"
    Console(stderr=True).print(text, highlight=False)
    if cost > _COSTLY and not yes:
        raise UserError(f"the estimated cost of {cost:.2f} is above {_COSTLY:.0f}: add --yes, or lower --limit")
