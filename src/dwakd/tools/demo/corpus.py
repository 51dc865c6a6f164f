"""The generated instruction corpus of `dwakd demo`.

A row fills one task's templates (`tasks.yaml`) with a random scene of people, towns, things and numbers
(`words.yaml`). Answering it requires reading the prompt, knowing a fact of a small closed world, or changing the form
of a sentence. Each task names the slots whose values form a combination, for example a name and a town. One
combination in eight never occurs in training, and the test rows consist of these only, so that no answer can be
memorised.
"""

import dataclasses
import itertools
import random
import zlib
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any

import yaml

from dwakd.data.sources import Example
from dwakd.errors import UserError

_HELD_OUT_SHARE = 8
MAX_TRIES = 2000  # draws for one row before the corpus is considered exhausted


class Word(str):
    """Value of a slot. The format `a` adds an indefinite article, `c` capitalises, and `ac` does both.

    Examples:
        >>> f"{Word('apple'):a}, {Word('plum'):ac}"
        'an apple, A plum'
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        text = str(self)
        if "a" in spec:
            text = ("an " if text[0] in "aeiou" else "a ") + text
        return text[0].upper() + text[1:] if "c" in spec else text


@dataclass(frozen=True)
class Task:
    """One kind of instruction, with format strings over the slots of a scene."""

    kind: str
    key: list[str]  # slots whose values form the combination that is either trained or held out
    prompts: list[str]  # paraphrases of the instruction
    answers: list[str]  # accepted answers: the response is one of them, and the references are all of them


@cache
def load_tasks() -> tuple[Task, ...]:
    """Read all tasks, in the order of their file."""
    return tuple(Task(kind, **fields) for kind, fields in load_words("tasks.yaml").items())


@cache
def load_words(name: str = "words.yaml") -> dict[str, Any]:
    """Read the words and facts, or another file of this package."""
    content: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    return content


def draw_scene(rng: random.Random) -> dict[str, Word]:
    """Draw a value for every slot that a template may name. The values of two slots such as name and name2 are different."""
    words = load_words()
    scene: dict[str, str] = {}
    draw = partial(_fill, scene)
    draw("name name2", *rng.sample(words["women"] + words["men"], 2))
    draw("they their", *(("she", "her") if scene["name"] in words["women"] else ("he", "his")))
    draw("town town2", *rng.sample(list(words["towns"]), 2))
    draw("job job2", *rng.sample(list(words["jobs"]), 2))
    draw("mood contrary", *_opposites(rng, words["moods"]))
    draw("verb past participle object", *rng.choice(words["verbs"]))
    draw("country work", words["towns"][scene["town"]], words["jobs"][scene["job"]])
    draw("place", rng.choice(words["places"]))
    for _ in range(2):  # the second draw replaces the first; with a single draw the corpus would be another one
        draw("day", rng.choice(words["days"]))
    draw("thing thing2", *rng.sample(words["things"], 2))
    draw("colour colour2", *rng.sample(words["colours"], 2))
    draw("adjective opposite", *_opposites(rng, words["opposites"]))
    first, second = rng.sample(words["animals"], 2)
    draw("animal animals young animals2", *first, second[1])
    kind, other_kind = rng.sample(list(words["kinds"]), 2)
    item, item2 = rng.sample(words["kinds"][kind], 2)
    other = rng.choice(words["kinds"][other_kind])
    draw("kind item other", kind, item, other)
    draw("three_items", ", ".join(rng.sample([item, item2, other], 3)))
    draw("two_items", " or ".join(rng.sample([item, other], 2)))
    few, many = sorted(rng.sample(range(2, 10), 2))
    left, right = rng.randint(2, 6), rng.randint(2, 6)
    draw("few many left right total", *(words["numbers"][n] for n in (few, many, left, right, left + right)))
    draw("span parts length", *rng.choice(words["spans"]))
    three = rng.sample(words["words"], 3)
    index = rng.randrange(3)
    draw("word1 word2 word3 sorted_words", *three, ", ".join(sorted(three)))
    draw("ordinal nth", words["ordinals"][index], three[index])
    return {slot: Word(value) for slot, value in scene.items()}


def _fill(scene: dict[str, str], names: str, *values: str) -> None:
    scene.update(zip(names.split(), values, strict=True))


def _opposites(rng: random.Random, table: dict[str, str]) -> tuple[str, str]:
    pair = rng.choice(list(table.items()))
    return pair if rng.random() < 0.5 else pair[::-1]


def is_held_out(task: Task, scene: dict[str, Word]) -> bool:
    """Return whether this combination of words is kept out of the training split, which does not depend on the seed."""
    combination = "|".join([task.kind, *(str(scene[slot]) for slot in task.key)])
    return zlib.crc32(combination.encode()) % _HELD_OUT_SHARE == 0


def make_corpus(num_train: int, num_test: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Generate the training and test rows, which are the same in every process.

    Every task gets the same number of rows, and the rows are shuffled, so that any leading part of a split contains
    all tasks about equally often. No prompt occurs twice, and no combination of a test row occurs in training.

    Raises:
        UserError: the corpus has fewer distinct prompts than requested rows.
    """
    rng, splits = random.Random(seed), []
    seen: set[str] = set()
    for num_rows, held_out in ((num_test, True), (num_train, False)):
        tasks = itertools.islice(itertools.cycle(load_tasks()), num_rows)
        rows = [_row(rng, task, seen, held_out=held_out) for task in tasks]
        rng.shuffle(rows)
        splits.append([dataclasses.replace(row, index=index) for index, row in enumerate(rows)])
    return splits[1], splits[0]


def _row(rng: random.Random, task: Task, seen: set[str], *, held_out: bool) -> Example:
    """Draw a prompt that is not in `seen` and add it there; the references are all accepted answers."""
    for _ in range(MAX_TRIES):
        scene = draw_scene(rng)
        prompt = rng.choice(task.prompts).format_map(scene)
        if is_held_out(task, scene) is held_out and prompt not in seen:
            seen.add(prompt)
            references = tuple(answer.format_map(scene) for answer in task.answers)
            return Example(0, prompt, response=rng.choice(references), references=references)
    raise UserError(f"the demo's corpus has no more distinct prompts for the task '{task.kind}': request fewer rows")
