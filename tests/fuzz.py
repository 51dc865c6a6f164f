"""Give random input to dwakd: `python -m tests.fuzz --inputs 100000`.

Every input must be accepted or refused with a UserError. Any other exception ends the program with a small input that causes
it. The inputs are recipes, rows, conversations, damaged teacher caches, and texts of whole batches. hypothesis chooses them.
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dwakd.cache.store import open_complete
from dwakd.data.collator import collate
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from dwakd.recipe.recipe import load_recipe
from tests.builders import byte_bpe, unigram_byte_fallback
from tests.cache.builders import save_teacher, trainer

SHARES = {"recipe": 0.3, "rows": 0.3, "conversations": 0.2, "texts": 0.18, "cache": 0.02}
RECIPE: dict[str, Any] = {
    "student": {"model": "student", "peft": {"r": 8}},
    "teacher": {"model": "teacher", "cache": "cache"},
    "data": {"train": "data.jsonl", "template": "plain", "max_length": 128},
    "loss": {"method": "dwa_kd", "temperature": 2.0, "band": True},
    "training": {"learning_rate": 1e-3, "max_steps": 10},
    "evaluation": {"test": ["test.jsonl"], "seeds": 3, "temperatures": [1.0]},
    "generate": {"prompts": ["more.jsonl"], "samples": 1},
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
NAMES = ["prompt", "response", "instruction", "input", "output", "messages", "system", "tools", "text", "weight"]

text = st.text(st.characters(codec=None), max_size=20)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(["", "1e5", "null", "<s>", "{x}"])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
words = st.text(min_size=1, max_size=20)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "developer"]) | scalars
strange_turn = st.fixed_dictionaries(
    {"role": roles, "content": text | values},
    optional={"tool_calls": values, "reasoning_content": values, "weight": values, "name": values},
)
asked, answered = (st.fixed_dictionaries({"role": st.just(role), "content": words}) for role in ("user", "assistant"))
turn_lists = st.tuples(asked, answered, asked, answered | strange_turn).map(list) | st.tuples(asked, answered).map(list)
turn_lists |= st.tuples(asked, strange_turn, answered).map(list) | st.lists(strange_turn, max_size=4)


class Fuzzer:
    """The targets, which share a folder, two tokenizers and a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizers = byte_bpe(), unigram_byte_fallback()
        for tokenizer in tokenizers:
            tokenizer.chat_template = CHAT
        self.encoders = {name: [TextEncoder(one, name) for one in tokenizers] for name in ("plain", "chat")}
        self.cache = folder / "cache"
        trainer(folder / "run", save_teacher(folder / "teacher"), cache=self.cache)
        self.states = self._states()

    def recipe(self, section: str, option: str, value: Any, noise: tuple[int, bytes], override: str) -> None:
        content = {**RECIPE, section: {**RECIPE[section], option: value} if option else value}
        data = yaml.safe_dump(content, allow_unicode=True).encode(errors="surrogatepass")
        place = noise[0] % (len(data) + 1)
        path = self.folder / "recipe.yaml"
        path.write_bytes(data[:place] + noise[1] + data[place + len(noise[1]) :])
        load_recipe(path, [override] if override else [])

    def rows(self, rows: list[Any], noise: tuple[int, bytes]) -> None:
        data = "\n".join(json.dumps(row) for row in rows).encode(errors="surrogatepass")
        place = noise[0] % (len(data) + 1)
        path = self.folder / "rows.jsonl"
        path.write_bytes(data[:place] + noise[1] + data[place + len(noise[1]) :])
        self._encode(load_examples(str(path)), "plain")

    def conversations(self, rows: list[dict[str, Any]], supervise: str) -> None:
        self._encode(load_examples(rows, supervise=supervise), "chat")

    def texts(self, texts: list[tuple[str, str]], max_length: int) -> None:
        rows = [{"prompt": prompt, "response": response} for prompt, response in texts]
        self._encode(load_examples(rows), "plain", max_length)

    def damaged(self, name: str, place: int, change: bytes) -> None:
        path = self.cache / name
        saved = path.read_bytes()
        place %= len(saved)
        data = saved[:place] + change + saved[place + len(change) :] if change else saved[:place]
        try:
            path.write_bytes(data)
            assert self._states() == self.states, f"{name} is damaged at {place} and was accepted"
        finally:
            path.write_bytes(saved)

    def _states(self) -> bytes:
        cache = open_complete(self.cache)
        return bytes(cache.read(range(len(cache.index.keys))).view(torch.uint8).numpy().data)

    def _encode(self, examples: list[Any], template: str, max_length: int = 64) -> None:
        pairs = encode_pairs(
            examples, *self.encoders[template], max_length=max_length, max_prompt_length=max_length // 2
        )
        batch = collate([pairs[index] for index in range(len(pairs))])
        for side in batch:
            assert bool(side.response_mask.any(1).all()), "a row without a response was accepted"
            ends = [side.byte_ends[row][mask].tolist() for row, mask in enumerate(side.response_mask)]
            assert all(row == sorted(row) for row in ends), "the ends of tokens do not increase"


def targets(fuzzer: Fuzzer) -> dict[str, Any]:
    """Return each target with the strategies of its arguments."""
    noise = st.tuples(st.integers(0, 10**6), st.sampled_from([b""] * 5) | st.binary(min_size=1, max_size=3))
    columns = st.dictionaries(st.sampled_from(NAMES) | text, values, max_size=5)
    good_row = st.fixed_dictionaries({"prompt": words, "response": words}, optional={"input": text, "id": values})
    rows = st.lists(good_row, min_size=1, max_size=3) | st.lists(columns | good_row | values, max_size=3)
    options = sorted({name for section in RECIPE.values() for name in section})
    override = st.just("") | st.builds("{}={}".format, st.sampled_from(["loss.temperature", "data.", "x"]) | text, text)
    conversation = st.fixed_dictionaries({"messages": turn_lists | turn_lists | values}, optional={"tools": values})
    files = st.sampled_from(sorted(path.name for path in fuzzer.cache.iterdir() if path.stat().st_size))
    option = st.sampled_from(["", *options]) | text
    return {
        "recipe": given(st.sampled_from(sorted(RECIPE)), option, values, noise, override)(fuzzer.recipe),
        "rows": given(rows, noise)(fuzzer.rows),
        "conversations": given(st.lists(conversation, min_size=1, max_size=2), st.sampled_from(["last", "all"]))(
            fuzzer.conversations
        ),
        "texts": given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.integers(4, 64))(fuzzer.texts),
        "cache": given(files, st.integers(0, 10**6), st.binary(max_size=3))(fuzzer.damaged),
    }


def main() -> None:
    """Run all targets and print the number of inputs, and how many of them were refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        fuzzer = Fuzzer(Path(name))
        for target, test in targets(fuzzer).items():
            counts = [0, 0]
            inner = test.hypothesis.inner_test

            def counted(*arguments: Any, inner: Any = inner, counts: list[int] = counts, **named: Any) -> None:
                counts[0] += 1
                try:
                    inner(*arguments, **named)
                except UserError:
                    counts[1] += 1

            test.hypothesis.inner_test = counted
            number = max(1, round(chosen.inputs * SHARES[target]))
            checks, phases = list(HealthCheck), [Phase.generate, Phase.shrink]
            limits = settings(
                max_examples=number, deadline=None, database=None, suppress_health_check=checks, phases=phases
            )
            seed(chosen.seed)(limits(test))()
            print(f"{target}: {counts[0]:,} inputs, {counts[1]:,} refused", flush=True)


if __name__ == "__main__":
    main()
