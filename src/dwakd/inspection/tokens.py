"""Pair the tokens of student and teacher in encoded responses, and count how many of them match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from dwakd.align.offsets import byte_groups, exact_rows
from dwakd.data.encoded import EncodedPairs, EncodedSide
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example

MATCHES = {
    "exact": "matched exactly: one token of each model",
    "group": "matched by group: several tokens of a model",
    "none": "not matched",
}
"""How a token matches: one token of the other model covers the same bytes, a group of tokens does, or none."""
_NUMBER = re.compile(r"\d(?:[.,]?\d)+")
_MARKS = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})


NAMES = ("student", "teacher")


class Token(NamedTuple):
    """A response token: its text with visible white space, its byte group, a key of `MATCHES`, and its end in bytes."""

    text: str
    group: int
    match: str
    end: int


class Side(NamedTuple):
    """What one model reads of a row. Only the response tokens, the end token included, are supervised."""

    prompt: str
    num_prompt: int
    tokens: list[Token]
    is_changed: bool  # whether the tokens spell another text than the response


class Number(NamedTuple):
    """A number of two or more digits in a response, and the tokens of both models that contain it."""

    text: str
    student: str
    teacher: str
    is_exact: bool


class Row(NamedTuple):
    """A row with the sides of the student and, if there is one, of the teacher."""

    number: int  # counted from 0
    text: str  # the part of the response that is supervised
    removed: str  # the part that truncation removed
    truncated: bool
    sides: list[Side]

    def groups(self) -> list[tuple[str, list[list[str]]]]:
        """Return the match of each byte group and, for each side, the texts of its tokens."""
        found: list[tuple[str, list[list[str]]]] = []
        for number, side in enumerate(self.sides):
            for token in side.tokens:
                if token.group == len(found):
                    found.append((token.match, [[] for _ in self.sides]))
                elif number == 0:  # an exact match may follow the space that SentencePiece puts before a text
                    found[token.group] = (token.match, found[token.group][1])
                found[token.group][1][number].append(token.text)
        return found

    def numbers(self) -> Iterator[Number]:
        """Yield the numbers of two or more digits in the response."""
        own, theirs = self.sides[0].tokens, self.sides[-1].tokens
        ends = [0, *accumulate((token.end for token in own), max)]
        for found in _NUMBER.finditer(self.text):
            start, stop = (len(self.text[:place].encode()) for place in found.span())
            inside = [token for n, token in enumerate(own) if ends[n + 1] > start and ends[n] < stop]
            groups = {token.group for token in inside}
            student, teacher = ("|".join(t.text for t in side if t.group in groups) for side in (inside, theirs))
            yield Number(found[0], student, teacher, all(token.match == "exact" for token in inside))


def align_rows(pairs: EncodedPairs, examples: Sequence[Example], encoders: Sequence[TextEncoder]) -> list[Row]:
    """Pair the tokens of the student with those of the first teacher, or with themselves if there is no teacher."""
    kept = {row.example_id for row in pairs.rows}
    responses = {each.index: encoders[0].with_response(each).response for each in examples if each.index in kept}
    columns = [row.student for row in pairs.rows], [(row.student, *row.teachers)[:2][-1] for row in pairs.rows]
    own, theirs = map(_pack, columns)
    groups = byte_groups(*own, *theirs)
    shared = own[0][groups.student_last] == theirs[0][groups.teacher_last]
    models = (columns[0], groups.student, own, theirs), (columns[1], groups.teacher, theirs, own)
    sides: list[list[Side]] = [[] for _ in pairs.rows]
    for encoder, (column, group, mine, other) in zip(encoders, models, strict=False):
        kinds = torch.where(exact_rows(*mine, *other) >= 0, 0, torch.where(shared[group], 1, 2))
        table, read, lengths = encoder.token_bytes(), encoder.tokenizer.decode, mine[1].tolist()
        for n, (side, numbers, kind) in enumerate(
            zip(column, torch.split(group, lengths), torch.split(kinds, lengths), strict=True)
        ):
            ids = side.ids.tolist()
            prompt, response = read(ids[: side.num_prompt], clean_up_tokenization_spaces=False), ids[side.num_prompt :]
            texts = [_visible(table[index]) or encoder.tokenizer.convert_ids_to_tokens(index) for index in response]
            matches = [list(MATCHES)[index] for index in kind.tolist()]
            tokens = map(Token, texts, (numbers - numbers[0]).tolist(), matches, side.byte_ends.tolist())
            spelled = read(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            is_changed = spelled.strip() != pairs.rows[n].text.strip()
            sides[n].append(Side(prompt, side.num_prompt, list(tokens), is_changed))
    return [
        Row(row.example_id, row.text, responses[row.example_id].removeprefix(row.text), row.truncated, found)
        for row, found in zip(pairs.rows, sides, strict=True)
    ]


def _pack(sides: Sequence[EncodedSide]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends and the lengths of one model's tokens, as the functions of `dwakd.align.offsets` read them."""
    ends = np.concatenate([side.byte_ends for side in sides]).astype(np.int64)
    return torch.from_numpy(ends), torch.tensor([len(side.byte_ends) for side in sides])


def _visible(spelled: bytes | None) -> str:
    """Return the text of a token with visible white space; bytes that are no whole character are written as \\xe2."""
    return (spelled or b"").decode(errors="backslashreplace").translate(_MARKS)


class Summary:
    """Counts over the rows of a sample."""

    def __init__(self, pairs: EncodedPairs, rows: Sequence[Row]) -> None:
        self.rows, self.num_cut, self.skipped = rows, pairs.num_truncated, pairs.report
        self.numbers = [number for row in rows for number in row.numbers()]
        self.unmatched = [number for number in self.numbers if not number.is_exact]

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values to show."""
        columns = [[side.tokens for side in column] for column in zip(*(row.sides for row in self.rows), strict=True)]
        means = " and ".join(f"{sum(map(len, column)) / len(self.rows):.1f}" for column in columns)
        found = [
            ("rows", f"{len(self.rows)}, {self.num_cut} of them cut"),
            ("tokens per response, student and teacher", means),
        ]
        if len(columns) > 1:
            matches = Counter(token.match for tokens in columns[0] for token in tokens)
            total = matches.total()
            found += [
                (text, f"{100 * matches[name] / total:.1f} % of the student's tokens") for name, text in MATCHES.items()
            ]
            count = len(self.numbers)
            numbers = f"{len(self.unmatched)} of {count} not matched exactly" if count else "none"
            found.append(("numbers of two or more digits", numbers))
        return found

    def examples(self) -> list[Number]:
        """Return some different numbers that are not matched exactly."""
        return list(dict.fromkeys(self.unmatched))[:8]
