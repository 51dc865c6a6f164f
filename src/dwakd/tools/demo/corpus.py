"""The generated instruction corpus of `dwakd demo`.

A row is a random scene (people, towns, things, numbers) put through one task's templates (`tasks.yaml`). To answer
is to read the prompt, to know a fact of a closed little world, or to change a sentence's form. Each task names the
slots that make up its combination, for example a name and a town. One combination in eight never occurs in
training, and the dev and test rows consist of these only, so that no answer can be looked up.
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
_MAX_TRIES = 2000  # draws for one row before its task counts as exhausted


class Word(str):
    """A slot's value; the format `a` puts the indefinite article before it, `c` capitalises, `ac` does both.

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
        kind: its name.
        key: slots of a scene whose values make the combination that is either trained or held out.
        prompts: paraphrases of the instruction, as format strings over the slots.
        answers: accepted answers; the response is one of them, the references are all.
    """

    kind: str
    key: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


@cache
def load_tasks() -> tuple[Task, ...]:
    """All the tasks, in the order of their file."""
    text = resources.files("dwakd.tools.demo").joinpath("tasks.yaml").read_text(encoding="utf-8")
    return tuple(
        Task(kind, tuple(fields["key"]), tuple(fields["prompts"]), tuple(fields["answers"]))
        for kind, fields in yaml.safe_load(text).items()
    )


def draw_scene(rng: random.Random) -> dict[str, Word]:
    """Values for every slot that a template may name; slots ending in 2 differ from their first."""
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
    """A word and its opposite, in either direction."""
    pair = rng.choice(list(table.items()))
    return pair if rng.random() < 0.5 else pair[::-1]


def is_held_out(task: Task, scene: dict[str, Word]) -> bool:
    """Whether this task's combination of words is kept out of the training split; the same for every seed."""
    combination = "|".join([task.kind, *(str(scene[slot]) for slot in task.key)])
    return zlib.crc32(combination.encode()) % _HELD_OUT_SHARE == 0


def make_corpus(
    num_train: int, num_dev: int, num_test: int, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Generate the training, dev and test rows.

    The tasks take turns and the rows are then shuffled, so that any leading part of a split has them all in
    like shares. No prompt occurs twice, and no combination of a dev or test row occurs in training.

    Args:
        num_train: number of training rows.
        num_dev: number of dev rows.
        num_test: number of test rows.
        seed: the same seed gives the same rows, in every process.

    Returns:
        The three splits; `index` counts within the split, `references` are all the accepted answers.

    Raises:
        UserError: more rows are wanted than the corpus has distinct prompts for.
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
    """A prompt that is not in `seen` (and is put there), its response and all its accepted answers."""
    for _ in range(_MAX_TRIES):
        scene = draw_scene(rng)
        prompt = rng.choice(task.prompts).format_map(scene)
        if is_held_out(task, scene) is held_out and prompt not in seen:
            seen.add(prompt)
            references = tuple(answer.format_map(scene) for answer in task.answers)
            return prompt, rng.choice(references), references
    raise UserError(f"The demo's corpus has no more distinct prompts for the task '{task.kind}'; ask for fewer rows.")


def check(example: Example, answer: str) -> bool:
    """Whether an answer is one of the accepted ones, up to white space, letter case and a missing full stop."""
    return _content(answer) in {_content(reference) for reference in example.references}


def _content(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
