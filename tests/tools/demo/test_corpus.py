"""Test the demo's corpus: splits without overlap, correct answers, and the same rows for the same seed."""

import hashlib
import os
import random
import re
import string
import subprocess
import sys
from itertools import pairwise

import pytest

from dwakd.errors import UserError
from dwakd.tools.demo.corpus import Task, Word, draw_scene, is_held_out, load_tasks, load_words, make_corpus
from tests.tools.demo.builders import NUM_TEST, NUM_TRAIN, Splits

FINGERPRINT = """
import hashlib
from dwakd.tools.demo.corpus import make_corpus
from dwakd.tools.demo.tokenizers import demo_tokenizers
splits = make_corpus(680, 68, seed=5)
texts = [text for split in splits for row in split for text in (row.instruction, row.response)]
tokenizers = [tokenizer.backend_tokenizer.to_str() for tokenizer in demo_tokenizers(texts)]
print(hashlib.sha256(repr((splits, tokenizers)).encode()).hexdigest())
"""


def _slots(template: str) -> set[str]:
    return {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}


def _read_back(instruction: str) -> tuple[Task, dict[str, Word]]:
    """Find the task and the slots of an instruction from its text."""
    for task in load_tasks():
        for prompt in task.prompts:
            pattern, known = "", set()
            for literal, slot, _, _ in string.Formatter().parse(prompt):
                pattern += re.escape(literal)
                if slot:
                    pattern += f"(?:an? )?(?P={slot})" if slot in known else f"(?:an? )?(?P<{slot}>.+?)"
                    known.add(slot)
            if match := re.fullmatch(pattern, instruction):
                return task, {slot: Word(value) for slot, value in match.groupdict().items()}
    raise AssertionError(instruction)


def test_sizes_and_indices(splits: Splits) -> None:
    """The splits have the requested sizes, and each row has its own index."""
    assert [len(split) for split in splits] == [NUM_TRAIN, NUM_TEST]
    for split in splits:
        assert [row.index for row in split] == list(range(len(split)))


def test_no_prompt_occurs_twice(splits: Splits) -> None:
    """No prompt occurs twice, in one split or in both."""
    prompts = [row.instruction for split in splits for row in split]
    assert len(set(prompts)) == len(prompts)


def test_test_combinations_never_occur_in_training(splits: Splits) -> None:
    """The combinations of words in the test split never occur in the training split."""
    train, test = splits
    trained = set()
    for row in train:
        task, slots = _read_back(row.instruction)
        if all(slot in slots for slot in task.key):
            trained.add((task.kind, *(slots[slot] for slot in task.key)))
    compared = 0
    for row in test:
        task, slots = _read_back(row.instruction)
        if all(slot in slots for slot in task.key):
            compared += 1
            assert (task.kind, *(slots[slot] for slot in task.key)) not in trained, row.instruction
    assert compared > NUM_TEST / 2
    assert len(trained) > NUM_TRAIN / 2


def test_every_task_has_its_share_of_any_leading_part(splits: Splits) -> None:
    """Any leading part of a split contains all tasks about equally often."""
    kinds = [_read_back(row.instruction)[0].kind for row in splits[0][:850]]
    counts = {task.kind: kinds.count(task.kind) for task in load_tasks()}
    assert len(counts) >= 30
    assert min(counts.values()) >= 8
    assert max(counts.values()) <= 50


def test_answers_are_short_and_accepted(splits: Splits) -> None:
    """Responses are short and among their own references."""
    for row in (row for split in splits for row in split):
        assert row.response in row.references
        assert all(3 <= len(reference.split()) <= 15 for reference in row.references), row
        assert len(row.instruction.split()) <= 40
        assert not re.search(r"[{}_]| {2}", " ".join([row.instruction, *row.references])), row


def test_answers_depend_on_the_prompt(splits: Splits) -> None:
    """There are many different answers, so that frequent answers alone give a low score."""
    responses = [row.response for row in splits[1]]
    trained = {reference for row in splits[0] for reference in row.references}
    assert len(set(responses)) > 0.9 * len(responses)
    assert sum(response not in trained for response in responses) > 0.4 * len(responses)


@pytest.mark.parametrize("task", load_tasks(), ids=lambda task: task.kind)
def test_templates_name_known_slots(task: Task) -> None:
    """Templates contain only known slots, and each task has several prompts."""
    scene = draw_scene(random.Random(0))
    for template in task.prompts + task.answers:
        assert _slots(template) <= set(scene), template
    assert set(task.key) <= set(scene)
    assert len(set(task.prompts)) == len(task.prompts) >= 2


@pytest.mark.parametrize("seed", range(50))
def test_scenes_are_true(seed: int) -> None:
    """Sums, orders and facts of a scene are correct."""
    scene, words = draw_scene(random.Random(seed)), load_words()
    number = {word: value for value, word in enumerate(words["numbers"])}
    assert number[scene["left"]] + number[scene["right"]] == number[scene["total"]]
    assert number[scene["few"]] < number[scene["many"]]
    three = [scene["word1"], scene["word2"], scene["word3"]]
    assert scene["sorted_words"].split(", ") == sorted(three)
    assert scene["nth"] == three[["first", "second", "third"].index(scene["ordinal"])]
    assert words["towns"][scene["town"]] == scene["country"]
    assert scene["item"] in words["kinds"][scene["kind"]]
    assert scene["other"] not in words["kinds"][scene["kind"]]
    assert (scene["they"] == "she") is (scene["name"] in words["women"])
    both = words["opposites"] | {second: first for first, second in words["opposites"].items()}
    assert both[scene["adjective"]] == scene["opposite"]
    for slot in scene:
        if slot.endswith("2") and slot != "word2":
            assert scene[slot] != scene[slot[:-1]], slot


def test_words_are_unambiguous() -> None:
    """No word has two opposites, kinds or genders."""
    words = load_words()
    assert not set(words["women"]) & set(words["men"])
    for table in (words["opposites"], words["moods"]):
        both = [*table, *table.values()]
        assert len(set(both)) == len(both)
    items = [item for items in words["kinds"].values() for item in items]
    assert len(set(items)) == len(items)
    assert all(first[0] < second[0] for first, second in pairwise(words["words"]))


def test_held_out_share(splits: Splits) -> None:
    """About one combination in eight is held out."""
    rng = random.Random(0)
    task = load_tasks()[0]
    share = sum(is_held_out(task, draw_scene(rng)) for _ in range(2000)) / 2000
    assert 0.08 < share < 0.18


def test_the_seed_determines_the_rows() -> None:
    """The same seed gives the same rows, and another seed other rows."""
    assert make_corpus(68, 34, seed=1) == make_corpus(68, 34, seed=1)
    assert make_corpus(68, 34, seed=1) != make_corpus(68, 34, seed=2)


def test_exhausted_corpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for more rows than the corpus has raises an error."""
    monkeypatch.setattr("dwakd.tools.demo.corpus.MAX_TRIES", 50)
    with pytest.raises(UserError, match="fewer rows"):
        make_corpus(0, 20_000, seed=0)


def test_same_corpus_and_tokenizers_in_every_process() -> None:
    """Corpus and tokenizers are the same in every process."""
    prints = set()
    for hash_seed, threads in (("1", "1"), ("2", "2")):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", FINGERPRINT]
        prints.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(prints) == 1
    assert len(prints.pop().strip()) == len(hashlib.sha256().hexdigest())
