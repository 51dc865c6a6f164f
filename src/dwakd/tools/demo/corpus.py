"""The generated instruction corpus of `dwakd demo`.

A row fills one task's templates (`tasks.yaml`) with a random scene of people, towns, things and numbers. Answering it
requires reading the prompt, knowing a fact of a small closed world, or changing the form of a sentence. Each task
names the slots whose values form a combination, for example a name and a town. One combination in eight never occurs
in training, and the dev and test rows consist of these only, so that no answer can be memorised.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.tools.demo import lexicon

_HELD_OUT_SHARE = 8
_MAX_TRIES = 2000  # draws for one row before the corpus is considered exhausted


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
    """One kind of instruction.

    Args:
        kind: name of the task.
        key: slots of a scene whose values form the combination that is either trained or held out.
        prompts: paraphrases of the instruction, as format strings over the slots.
        answers: accepted answers, as format strings. The response is one of them, and the references are all of them.
    """

    kind: str
    key: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


@cache
def load_tasks() -> tuple[Task, ...]:
    """Read all tasks, in the order of their file."""
    text = resources.files("dwakd.tools.demo").joinpath("tasks.yaml").read_text(encoding="utf-8")
    return tuple(
        Task(kind, tuple(fields["key"]), tuple(fields["prompts"]), tuple(fields["answers"]))
        for kind, fields in yaml.safe_load(text).items()
    )


def draw_scene(rng: random.Random) -> dict[str, Word]:
    """Draw a value for every slot that a template may name; a slot ending in 2 differs from the one without it."""
    slots = _people(rng) | _things(rng) | _numbers(rng) | _word_list(rng)
    return {slot: Word(value) for slot, value in slots.items()}


def _people(rng: random.Random) -> dict[str, str]:
    women, men = lexicon.WOMEN, lexicon.MEN
    name, name2 = rng.sample(women + men, 2)
    they, their = ("she", "her") if name in women else ("he", "his")
    town, town2 = rng.sample(list(lexicon.TOWNS), 2)
    job, job2 = rng.sample(list(lexicon.JOBS), 2)
    mood, contrary = _opposites(rng, lexicon.MOODS)
    verb, past, participle, thing = rng.choice(lexicon.VERBS)
    people = {"name": name, "name2": name2, "they": they, "their": their, "mood": mood, "contrary": contrary}
    places = {"town": town, "town2": town2, "country": lexicon.TOWNS[town], "place": rng.choice(lexicon.PLACES)}
    deeds = {
        "verb": verb,
        "past": past,
        "participle": participle,
        "object": thing,
        "day": rng.choice(lexicon.DAYS),
    }
    work = {"job": job, "job2": job2, "work": lexicon.JOBS[job], "day": rng.choice(lexicon.DAYS)}
    return people | places | deeds | work


def _things(rng: random.Random) -> dict[str, str]:
    thing, thing2 = rng.sample(lexicon.THINGS, 2)
    colour, colour2 = rng.sample(lexicon.COLOURS, 2)
    adjective, opposite = _opposites(rng, lexicon.OPPOSITES)
    (animal, animals, young), (_, animals2, _) = rng.sample(lexicon.ANIMALS, 2)
    kind, other_kind = rng.sample(list(lexicon.KINDS), 2)
    item, item2 = rng.sample(lexicon.KINDS[kind], 2)
    other = rng.choice(lexicon.KINDS[other_kind])
    three_items = ", ".join(rng.sample([item, item2, other], 3))
    two_items = " or ".join(rng.sample([item, other], 2))
    looks = {"thing": thing, "thing2": thing2, "colour": colour, "colour2": colour2}
    beasts = {"animal": animal, "animals": animals, "young": young, "animals2": animals2}
    kinds = {"kind": kind, "item": item, "other": other, "two_items": two_items, "three_items": three_items}
    return looks | beasts | kinds | {"adjective": adjective, "opposite": opposite}


def _numbers(rng: random.Random) -> dict[str, str]:
    few, many = sorted(rng.sample(range(2, 10), 2))
    left, right = rng.randint(2, 6), rng.randint(2, 6)
    span, parts, length = rng.choice(lexicon.SPANS)
    values = {"few": few, "many": many, "left": left, "right": right, "total": left + right}
    words = {slot: lexicon.NUMBERS[value] for slot, value in values.items()}
    return words | {"span": span, "parts": parts, "length": length}


def _word_list(rng: random.Random) -> dict[str, str]:
    words = rng.sample(lexicon.WORDS, 3)
    index = rng.randrange(3)
    slots = {f"word{number}": word for number, word in enumerate(words, start=1)}
    return slots | {
        "ordinal": lexicon.ORDINALS[index],
        "nth": words[index],
        "sorted_words": ", ".join(sorted(words)),
    }


def _opposites(rng: random.Random, table: dict[str, str]) -> tuple[str, str]:
    """Draw a word and its opposite, in either direction."""
    pair = rng.choice(list(table.items()))
    return pair if rng.random() < 0.5 else pair[::-1]


def is_held_out(task: Task, scene: dict[str, Word]) -> bool:
    """Return whether this combination of words is kept out of the training split, which does not depend on the seed."""
    combination = "|".join([task.kind, *(str(scene[slot]) for slot in task.key)])
    return zlib.crc32(combination.encode()) % _HELD_OUT_SHARE == 0


def make_corpus(
    num_train: int, num_dev: int, num_test: int, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Generate the training, dev and test rows.

    Every task gets the same number of rows, and the rows are shuffled, so that any leading part of a split contains
    all tasks about equally often. No prompt occurs twice, and no combination of a dev or test row occurs in training.

    Args:
        num_train: number of training rows.
        num_dev: number of dev rows.
        num_test: number of test rows.
        seed: seed of the rows; they are the same in every process.

    Returns:
        The three splits. `index` is the position in the split, and `references` are all accepted answers.

    Raises:
        UserError: the corpus has fewer distinct prompts than requested rows.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    test = _split(rng, num_test, seen, held_out=True)
    dev = _split(rng, num_dev, seen, held_out=True)
    return _split(rng, num_train, seen, held_out=False), dev, test


def _split(rng: random.Random, num_rows: int, seen: set[str], *, held_out: bool) -> list[Example]:
    tasks = load_tasks()
    rows = [_row(rng, tasks[count % len(tasks)], seen, held_out=held_out) for count in range(num_rows)]
    rng.shuffle(rows)
    return [
        Example(index=index, instruction=prompt, response=response, references=references)
        for index, (prompt, response, references) in enumerate(rows)
    ]


def _row(rng: random.Random, task: Task, seen: set[str], *, held_out: bool) -> tuple[str, str, tuple[str, ...]]:
    """Draw a prompt that is not in `seen` and add it there; return it with its response and all accepted answers."""
    for _ in range(_MAX_TRIES):
        scene = draw_scene(rng)
        prompt = rng.choice(task.prompts).format_map(scene)
        if is_held_out(task, scene) is held_out and prompt not in seen:
            seen.add(prompt)
            references = tuple(answer.format_map(scene) for answer in task.answers)
            return prompt, rng.choice(references), references
    raise UserError(f"the demo's corpus has no more distinct prompts for the task '{task.kind}': request fewer rows")


def check(example: Example, answer: str) -> bool:
    """Return whether an answer is accepted, ignoring white space, case and a missing full stop."""
    return _content(answer) in {_content(reference) for reference in example.references}


def _content(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
