"""Encode rows with the tokenizers of student and teachers, truncated at the same character."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from dwakd.align.vocab import nearest_tokens, token_text
from dwakd.data.encoded import EncodedPairs, EncodedRow, EncodedSide, RowWriter
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import INVALID_ROWS, Example
from dwakd.errors import UserError
from dwakd.validation import check_choice

logger = logging.getLogger(__name__)

PROMPT_TOO_LONG = "prompt too long"
NOTHING_SUPERVISED = "no response token left"
REFUSED = "refused by the template or the model"
_CHUNK = 256
Finish: TypeAlias = Callable[[EncodedRow, Example], EncodedRow]


class _Tokens(NamedTuple):
    """A row with its response, and for each side the ids of the prompt and `TextEncoder.response_ids` of the response."""

    example: Example
    sides: list[tuple[list[int], tuple[list[int], list[int]]]]
    foreign: bool  # whether a teacher's template writes the answer with tool calls or reasoning differently


class InvalidRowError(UserError):
    """A row cannot be used; its message names the row."""

    def __init__(self, reason: str, problem: str = "") -> None:
        super().__init__(problem)
        self.reason = reason

    def __reduce__(self) -> Any:
        return type(self), (self.reason, str(self))


def encode_pairs(
    examples: Iterable[Example],
    student: TextEncoder,
    *teachers: TextEncoder,
    max_length: int = 512,
    max_prompt_length: int = 256,
    invalid_rows: str = "error",
    source: str = "train data",
    length_option: str | None = "data.max_length",
    need_response: bool = True,
    finish: Finish | None = None,
    writer: RowWriter | None = None,
) -> EncodedPairs:
    """Encode rows with all tokenizers, so that all sides contain the same characters of each response.

    If a row exceeds `max_length` on any side, its response *text* is truncated at the end of the last token that fits
    on the side with the least room, and all sides encode this text. Such a row has no end token; a warning states the
    number of such rows. A row with no response token left on some side is skipped and reported.

    The response of a row with tool calls or reasoning is what the student's chat template writes. The teachers read the
    same text after their own prompts; a warning states how often their templates would write another text.

    A prompt that only teachers see may have any length. It reduces the room for the response by at most
    `max_prompt_length` tokens.

    Args:
        examples: rows with responses.
        student: encoder of the student, followed by those of the teachers (none for SFT).
        max_length: maximum number of tokens per side: prompt, response and end token (512 in the paper's code).
        max_prompt_length: maximum number of tokens of a prompt per side (256 in the paper's code).
        invalid_rows: `error` refuses a prompt that is too long or has no token, an empty response, and a row that a
            chat template refuses; `skip` skips such rows and reports them.
        source: name of the data set in messages.
        length_option: name of the option that sets `max_length`, for messages; None for no warning of truncation.
        need_response: False if a response may be empty; its only token is then the end token.
        finish: changes each encoded row, given its example.
        writer: writes the rows to a file, instead of keeping them in memory.

    Raises:
        UserError: a row is invalid (see `invalid_rows`), no row can be used, or no room is left for a response.
    """
    check_choice("data.invalid_rows", invalid_rows, INVALID_ROWS)
    check_lengths(max_length, max_prompt_length)
    report: dict[str, list[int]] = {}
    first_error: dict[str, str] = {}
    num_parts, num_foreign, num_conversations = 0, 0, 0
    kept: Any = writer or []
    found = encode_rows(examples, [student, *teachers], max_length, max_prompt_length, need_response=need_response)
    for example, row, foreign in tqdm(found, f"tokenising {source}", unit=" rows", delay=2, leave=False):
        num_conversations += example.is_conversation
        if isinstance(row, EncodedRow):
            kept.append(row if finish is None else finish(row, example))
            num_parts, num_foreign = num_parts + (example.answer is not None), num_foreign + foreign
        else:
            report.setdefault(row.reason, []).append(example.index)
            first_error.setdefault(row.reason, f"{source}, {row}")
    pairs = EncodedPairs(kept if writer is None else writer.close(), report, source)
    _check_report(pairs, first_error, invalid_rows, length_option or "data.max_length")
    if pairs.num_truncated and length_option:
        logger.warning(
            "%s: %d of %d responses were truncated to fit %s=%d tokens and have no end token; raise %s",
            *(source, pairs.num_truncated, len(pairs), length_option, max_length, length_option),
        )
    if num_conversations and student.template == "alpaca":
        logger.warning(
            "%s: %d rows are conversations, which data.template: alpaca turns into one instruction each; set data.template: "
            "chat for the chat templates of the models, or ignore this warning if you want that",
            *(source, num_conversations),
        )
    if num_foreign:
        logger.warning(
            "%s: in %d of %d answers with tool calls or reasoning, a teacher's chat template writes another text than the "
            "student's, and the teacher reads the student's text",
            *(source, num_foreign, num_parts),
        )
    return pairs


def check_lengths(max_length: int, max_prompt_length: int) -> None:
    """Raise UserError unless the longest prompt leaves room for a response."""
    if not 1 <= max_prompt_length < max_length:
        limit = f"data.max_length={max_length}, which includes the response"
        raise UserError(f"data.max_prompt_length={max_prompt_length} must be at least 1 and below {limit}")


def encode_rows(
    examples: Iterable[Example],
    sides: Sequence[TextEncoder],
    max_length: int,
    max_prompt_length: int,
    *,
    need_response: bool,
) -> Iterator[tuple[Example, EncodedRow | InvalidRowError, bool]]:
    """Encode rows in chunks. Yield each row, its encoding or the error, and whether a teacher's template differs."""
    waiting = iter(examples)
    while chunk := list(islice(waiting, _CHUNK)):
        try:
            tokens: list[_Tokens | None] = [*_tokenise(chunk, sides, max_length)]
        except UserError:  # a template refuses a row; the rows are encoded one by one to find it
            tokens = [None] * len(chunk)
        for example, found in zip(chunk, tokens, strict=True):
            try:
                found = found or _tokenise([example], sides, max_length)[0]
                _check_row(found, max_prompt_length, need_response=need_response)
                yield example, _encode_row(found, sides, max_length, max_prompt_length), found.foreign
            except UserError as error:
                reason = error.reason if isinstance(error, InvalidRowError) else REFUSED
                problem = str(error).removeprefix(f"{example.place}: ")
                yield example, InvalidRowError(reason, f"{example.place}: {problem}"), False


def _tokenise(chunk: Sequence[Example], sides: Sequence[TextEncoder], max_length: int) -> list[_Tokens]:
    """Tokenise rows together, which is faster than one by one; of long responses, more than `max_length` tokens suffice."""
    student, *teachers = sides
    chunk = [student.with_response(example) for example in chunk]
    views = [chunk, *([teacher.teacher_view(example) for example in chunk] for teacher in teachers)]
    prompts = [side.prompt_ids_batch(view) for side, view in zip(sides, views, strict=True)]
    responses = [side.response_ids_batch([each.response for each in chunk], limit=max_length) for side in sides]
    found = []
    for n, example in enumerate(chunk):
        texts, foreign = [own[n] for own in responses], False
        if example.answer is not None:
            texts = [side.response_ids(example.response, special_tokens=True) for side in sides]
            foreign = any(view[n].answer is None for view in views)
        found.append(_Tokens(example, [(own[n], ids) for own, ids in zip(prompts, texts, strict=True)], foreign))
    return found


def _check_row(tokens: _Tokens, max_prompt_length: int, *, need_response: bool) -> None:
    example = tokens.example
    for k, (ids, _) in enumerate(tokens.sides):
        whose = "student" if k == 0 else "teacher" if k == 1 else f"teacher {k}"
        if len(ids) > max_prompt_length and not (k and example.teacher_turns is not None):
            limit = f"data.max_prompt_length={max_prompt_length}"
            raise InvalidRowError(PROMPT_TOO_LONG, f"the prompt has {len(ids)} tokens for the {whose}, above {limit}")
        if not ids:
            raise InvalidRowError("prompt without a token", f"the prompt has no tokens for the {whose}'s tokenizer")
    if need_response and not example.response.strip():
        raise InvalidRowError("response empty", "the response is empty")


def response_room(num_prompt: int, max_length: int, max_prompt_length: int) -> int:
    """Return the number of tokens that a side has for a response and its end token."""
    return max_length - min(num_prompt, max_prompt_length)


def _encode_row(
    tokens: _Tokens, encoders: Sequence[TextEncoder], max_length: int, max_prompt_length: int
) -> EncodedRow:
    """Truncate the response until it fits on every side, unless it fits with its end token."""
    example, sides, _ = tokens
    text, special = example.response, example.answer is not None
    rooms = [response_room(len(prompt), max_length, max_prompt_length) for prompt, _ in sides]
    truncated = any(len(ids) >= room for room, (_, (ids, _)) in zip(rooms, sides, strict=True))
    while cuts := [
        max(0, *ends[:room])  # the last end that is not negative
        for room, (_, (ids, ends)) in zip(rooms, sides, strict=True)
        if len(ids) > room
    ]:
        shorter = text.encode()[: min(cuts)].decode(errors="ignore")
        text = shorter if len(shorter) < len(text) else text[:-1]
        sides = [
            (prompt, encoder.response_ids(text, special_tokens=special))
            for encoder, (prompt, _) in zip(encoders, sides, strict=True)
        ]
    encoded = []
    for encoder, (prompt, (ids, ends)) in zip(encoders, sides, strict=True):
        if not ids and example.response:
            raise InvalidRowError(NOTHING_SUPERVISED)
        last, last_end = ([], []) if truncated else ([encoder.end_token_id], [len(text.encode())])
        byte_ends = np.array([*ends, *last_end], dtype=np.int32)
        encoded.append(EncodedSide(np.array([*prompt, *ids, *last], dtype=np.int32), len(prompt), byte_ends))
    return EncodedRow(example.index, text, encoded[0], tuple(encoded[1:]), truncated, example.place)


def _check_report(pairs: EncodedPairs, first_error: dict[str, str], invalid_rows: str, length_option: str) -> None:
    total = len(pairs) + (skipped := sum(map(len, pairs.report.values())))
    counts = ", ".join(f"{reason}: {len(rows)}" for reason, rows in pairs.report.items())
    for reason, rows in pairs.report.items():
        if invalid_rows == "error" and reason != NOTHING_SUPERVISED:
            fix = "raise data.max_prompt_length" if reason == PROMPT_TOO_LONG else "correct the data"
            found = f"{first_error[reason]} ({len(rows)} of {total} rows have this error)"
            raise UserError(f"{found}; {fix} or set data.invalid_rows: skip")
    if not len(pairs):
        fix = first_error.get(REFUSED, f"raise {length_option} and data.max_prompt_length or correct the data")
        raise UserError(f"{pairs.source}: none of its {total} rows can be used ({counts or 'no rows found'}); {fix}")
    if skipped:
        first = next(iter(first_error.values()))
        logger.warning("%s: skipping %d of %d rows (%s); first error: %s", pairs.source, skipped, total, counts, first)


def align_by_spelling(pairs: EncodedPairs, student: TextEncoder, *teachers: TextEncoder) -> None:
    """Set the `aligned_rows` of every teacher's side of `pairs`, unless they are already set; see `SpellingAligner`."""
    if not all(side.aligned_rows is not None for row in pairs.examined for side in row.teachers):
        align = SpellingAligner(student, *teachers)
        pairs.rows = [align(row) for row in tqdm(pairs.rows, "aligning tokens", unit="row", delay=2, leave=False)]


class SpellingAligner:
    """Set the `aligned_rows` of every teacher's side of a row (MinED).

    Dynamic time warping aligns the tokens that the models *read* at response positions, without their spaces. These
    start with the last token of the prompt and do not include the end token. A student token is aligned if the path
    pairs it with exactly one teacher token and `nearest_tokens` maps that token to the student's. Several student
    tokens may be aligned with the same teacher token; -1 marks a student token without one.
    """

    def __init__(self, student: TextEncoder, *teachers: TextEncoder) -> None:
        tables = [encoder.token_bytes() for encoder in (student, *teachers)]
        self._own_spelled, *self._spelled = (
            ["\0" if token is None else token_text(token).replace(" ", "") for token in tokens] for tokens in tables
        )
        self._student_of = [
            nearest_tokens(tokens, tables[0], (teacher.end_token_id, student.end_token_id)).numpy()
            for tokens, teacher in zip(tables[1:], teachers, strict=True)
        ]

    def __call__(self, row: EncodedRow) -> EncodedRow:
        from dwakd.align.edit_distance import edit_costs, one_to_one_rows  # numba loads slowly

        own = row.student.ids[row.student.num_prompt - 1 : -1]
        sides = []
        for side, spellings, nearest in zip(row.teachers, self._spelled, self._student_of, strict=True):
            other = side.ids[side.num_prompt - 1 : -1]
            rows = one_to_one_rows(edit_costs([self._own_spelled[i] for i in own], [spellings[i] for i in other]))
            accepted = (rows >= 0) & (nearest[other[np.maximum(rows, 0)]] == own)
            sides.append(replace(side, aligned_rows=np.where(accepted, rows, -1).astype(np.int32)))
        return replace(row, teachers=tuple(sides))


def check_encoded(pairs: EncodedPairs, encoders: Sequence[TextEncoder]) -> None:
    """Refuse rows that were encoded for another number of models, or with other tokenizers.

    One row that is not truncated is encoded again and compared.
    """
    row = next((row for row in pairs.rows[:100] if not row.truncated), None)
    if row is None:
        return
    sides = (row.student, *row.teachers)
    if len(sides) < len(encoders) or 1 < len(encoders) < len(sides):
        raise UserError(
            f"{pairs.source}: the rows were encoded for a student and {len(row.teachers)} teachers, but there are "
            f"{len(encoders) - 1}: encode them again"
        )
    for number, (side, encoder) in enumerate(zip(sides, encoders, strict=False)):
        kept = side.ids[side.num_prompt : -1].tolist()  # without the end token
        read = (encoder.response_ids(row.text, special_tokens=special)[0] for special in (False, True))
        if kept not in read:
            whose = f"teacher {number}" if number else "the student"
            raise UserError(
                f"{pairs.source}: the rows were not encoded with the tokenizer of {whose}: encode them again"
            )
