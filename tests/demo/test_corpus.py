"""The demo's corpus and tokenizers: what the comparison of the demo rests on."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from dwakd.data.sources import Example
from dwakd.demo.corpus import Task, Word, check, draw_scene, is_held_out, load_tasks, make_corpus
from dwakd.demo.tokenizers import demo_tokenizers
from dwakd.errors import UserError

Splits = tuple[list[Example], list[Example], list[Example]]
NUM_TRAIN, NUM_HELD_OUT = 3400, 170


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_corpus(NUM_TRAIN, NUM_HELD_OUT, NUM_HELD_OUT, seed=3)


@pytest.fixture(scope="module")
def texts(splits: Splits) -> list[str]:
    return [text for split in splits for example in split for text in (example.instruction, example.response)]


@pytest.fixture(scope="module")
def tokenizers(texts: list[str]):
    return demo_tokenizers(texts)


def _matches(task: Task, example: Example) -> list[dict[str, str]]:
    """The slot values under which one of the task's prompts gives this instruction."""
    found = []
    for prompt in task.prompts:
        pattern, seen = "", set()
        for literal, slot in re.findall(r"([^{]*)(?:\{(\w+)(?::\w+)?\})?", prompt):
            pattern += re.escape(literal)
            if slot:
                pattern += f"(?P={slot})" if slot in seen else f"(?P<{slot}>.+?)"
                seen.add(slot)
        if match := re.fullmatch(pattern, example.instruction):
            found.append(match.groupdict())
    return found


def test_sizes_and_indices(splits: Splits) -> None:
    """A short split, or an index that is no row number, would misname rows in every error message."""
    assert [len(split) for split in splits] == [NUM_TRAIN, NUM_HELD_OUT, NUM_HELD_OUT]
    for split in splits:
        assert [example.index for example in split] == list(range(len(split)))
