"""Encode rows with the tokenizers of student and teachers, truncated at the same character."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.data.sources import check_invalid_rows
from dwakd.errors import UserError

logger = logging.getLogger(__name__)

PROMPT_TOO_LONG = "prompt too long"
EMPTY_PROMPT = "prompt without a token"
EMPTY_RESPONSE = "response empty"
NOTHING_SUPERVISED = "no response token left"
REFUSED = "refused by the template"
_CHUNK = 256


@dataclass(frozen=True)
class EncodedSide:
    """A row encoded with one tokenizer.

    Args:
        ids: token ids of the prompt, of the response and, unless the response was truncated, of the end token.
        num_prompt: number of tokens of the prompt.
        byte_ends: end of each token after the prompt in the UTF-8 bytes of the (truncated) response, or a negative
            number in text that normalisation changed; see `TextEncoder.response_ids`.
        aligned_rows: set on a teacher's side if the method needs it; see `ModelSide`.
    """

    ids: NDArray[np.int32]
    num_prompt: int
    byte_ends: NDArray[np.int32]
    aligned_rows: NDArray[np.int32] | None = None

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.ids) - 1

    def features(self, prefix: str) -> dict[str, list[Any]]:
        """Return the fields of this side for a feature dict. Input position i predicts target i."""
        num_unsupervised = self.num_prompt - 1
        aligned = {}
        if self.aligned_rows is not None:
            aligned = {f"{prefix}_aligned_rows": self.aligned_rows.tolist()}
        return aligned | {
            f"{prefix}_input_ids": self.ids[:-1].tolist(),
            f"{prefix}_target_ids": self.ids[1:].tolist(),
            f"{prefix}_response_mask": [False] * num_unsupervised + [True] * len(self.byte_ends),
            f"{prefix}_byte_ends": [0] * num_unsupervised + self.byte_ends.tolist(),
        }


@dataclass(frozen=True)
class EncodedRow:
    """A row encoded for the student, the first teacher (None if there is no teacher) and the `others` after it."""

    example_id: int
    text: str
    student: EncodedSide
    teacher: EncodedSide | None
    others: tuple[EncodedSide, ...] = ()
    truncated: bool = False

    @property
    def teachers(self) -> tuple[EncodedSide, ...]:
        return () if self.teacher is None else (self.teacher, *self.others)


class EncodedPairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Data set of encoded rows. Its items are dicts of lists for `dwakd.data.collator.PairedCollator`.

    With several teachers, the list `others` of an item contains one dict for each teacher after the first.

    Args:
        rows: the encoded rows.
        report: the indices in the source of the rows that were skipped, by reason.
        num_truncated: number of encoded rows with a truncated response.
        source: name of the data set in messages.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        report: dict[str, list[int]],
        num_truncated: int = 0,
        source: str = "the data set passed in",
    ) -> None:
        self.rows = list(rows)
        self.report = report
        self.num_truncated = num_truncated
        self.source = source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {"example_id": row.example_id, **row.student.features("student")}
        if row.teacher is not None:
            item |= row.teacher.features("teacher")
        if row.others:
            item["others"] = [{"example_id": row.example_id, **side.features("teacher")} for side in row.others]
        return item

    def of_teacher(self, index: int) -> "EncodedPairs":
        """Return the same rows with only one of several teachers."""
        rows = [dataclasses.replace(row, teacher=row.teachers[index], others=()) for row in self.rows]
        return EncodedPairs(rows, self.report, self.num_truncated, self.source)

    @property
    def student_lengths(self) -> list[int]:
        """Number of tokens that the student reads in each row, used to group rows of similar length."""
        return [row.student.length for row in self.rows]


@dataclass
class _Draft:
    """A row during encoding: prompt ids, response ids and byte ends per side, student first, or the error message."""

    example: Example
    text: str
    prompts: list[list[int]] = dataclasses.field(default_factory=list)
    responses: list[tuple[list[int], list[int]]] = dataclasses.field(default_factory=list)
    truncated: bool = False
    refusal: str = ""


def encode_pairs(
    examples: Sequence[Example],
    student: TextEncoder,
    *teachers: TextEncoder,
    max_length: int = 512,
    max_prompt_length: int = 256,
    invalid_rows: str = "error",
    source: str = "train data",
    mend: str = "raise data.max_length and data.max_prompt_length or correct the data",
    length_option: str | None = "data.max_length",
) -> EncodedPairs:
    """Encode rows with all tokenizers, so that all sides contain the same characters of each response.

    If a row exceeds `max_length` on any side, its response *text* is truncated at the end of the last token that fits
    on the side with the least room, and all sides encode this text. Such a row has no end token; a warning states the
    number of such rows. A row with no response token left on some side is skipped and reported.

    Args:
        examples: rows with responses.
        student: the student's encoder.
        teachers: the teachers' encoders. Without any (SFT), items have no teacher fields.
        max_length: maximum number of tokens per side: prompt, response and end token (512 in the paper's code).
        max_prompt_length: maximum number of tokens of a prompt per side (256 in the paper's code).
        invalid_rows: `error` refuses a prompt that is too long or has no token, an empty response, and a row that a
            chat template refuses; `skip` skips such rows and reports them.
        source: name of the data set in messages.
        mend: the fix to name in the message if no row can be used.
        length_option: name of the option that sets `max_length`, for the warning of truncation; None for no warning.

    Returns:
        The encoded rows in order. Their `report` lists the skipped rows by reason.

    Raises:
        UserError: a row is invalid (see `invalid_rows`), no row can be used, or no room is left for a response.
    """
    check_invalid_rows(invalid_rows)
    if not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"data.max_prompt_length={max_prompt_length} must be at least 1 and below "
            f"data.max_length={max_length}, which includes the response: change one of them"
        )
    sides = [student, *teachers]
    rows: list[EncodedRow] = []
    report: dict[str, list[int]] = {}
    first_error: dict[str, str] = {}
    num_truncated = 0
    for draft in _draft(examples, sides, f"tokenising {source}"):
        reason, detail = _find_error(draft, max_prompt_length)
        if reason is None:
            _truncate(draft, sides, max_length)
            if all(ids for ids, _ in draft.responses):
                rows.append(_finish(draft, sides))
                num_truncated += draft.truncated
                continue
            reason = NOTHING_SUPERVISED
        report.setdefault(reason, []).append(draft.example.index)
        first_error.setdefault(reason, f"{source}, row {draft.example.index} (counting from 0): {detail}")
    _check_report(report, first_error, len(examples), len(rows), invalid_rows, source, mend)
    if num_truncated and length_option:
        logger.warning(
            "%s: %d of %d responses were truncated to fit %s=%d tokens and have no end token; raise %s",
            *(source, num_truncated, len(rows), length_option, max_length, length_option),
        )
    return EncodedPairs(rows, report, num_truncated, source)


def _draft(examples: Sequence[Example], sides: list[TextEncoder], title: str) -> Iterator[_Draft]:
    with tqdm(total=len(examples), desc=title, unit="row", delay=2, leave=False) as progress:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            yield from _encode_chunk(chunk, sides)
            progress.update(len(chunk))


def _encode_chunk(chunk: Sequence[Example], sides: list[TextEncoder]) -> list[_Draft]:
    """Encode rows together, or one by one if the template refuses one of them."""
    try:
        prompts = [side.prompt_ids_batch(chunk) for side in sides]
        responses = [side.response_ids_batch([example.response for example in chunk]) for side in sides]
    except UserError as error:
        if len(chunk) == 1:
            return [_Draft(chunk[0], chunk[0].response, refusal=str(error))]
        return [draft for example in chunk for draft in _encode_chunk([example], sides)]
    rows = zip(chunk, zip(*prompts, strict=True), zip(*responses, strict=True), strict=True)
    return [_Draft(example, example.response, list(ids), list(answers)) for example, ids, answers in rows]


def _find_error(draft: _Draft, max_prompt_length: int) -> tuple[str | None, str]:
    """Return the reason why a row is invalid, or None, and the text for the message."""
    if draft.refusal:
        return REFUSED, draft.refusal.removeprefix(f"row {draft.example.index} (counting from 0): ")
    names = ["student", "teacher", *(f"teacher {k}" for k in range(2, len(draft.prompts)))]
    for whose, ids in zip(names, draft.prompts, strict=False):
        if len(ids) > max_prompt_length:
            return PROMPT_TOO_LONG, (
                f"the prompt has {len(ids)} tokens for the {whose}, above data.max_prompt_length={max_prompt_length}"
            )
        if not ids:
            return EMPTY_PROMPT, f"the prompt has no token for the {whose}"
    if not draft.text.strip():
        return EMPTY_RESPONSE, "the response is empty"
    return None, ""


def _truncate(draft: _Draft, sides: list[TextEncoder], max_length: int) -> None:
    """Truncate the response text until it fits on every side, unless it already fits with its end token."""
    if all(len(p) + len(r[0]) + 1 <= max_length for p, r in zip(draft.prompts, draft.responses, strict=True)):
        return
    draft.truncated = True
    rooms = [max_length - len(prompt) for prompt in draft.prompts]
    while True:
        fitting = [
            max(0, *ends[:room]) if len(ids) > room else None  # the last end that is not negative
            for room, (ids, ends) in zip(rooms, draft.responses, strict=True)
        ]
        cuts = [end for end in fitting if end is not None]
        if not cuts:
            return
        shorter = draft.text.encode()[: min(cuts)].decode(errors="ignore")
        draft.text = shorter if len(shorter) < len(draft.text) else draft.text[:-1]
        draft.responses = [side.response_ids(draft.text) for side in sides]


def _finish(draft: _Draft, sides: list[TextEncoder]) -> EncodedRow:
    encoded = []
    for side, prompt, (ids, ends) in zip(sides, draft.prompts, draft.responses, strict=True):
        last = [] if draft.truncated else [side.end_token_id]
        encoded.append(
            EncodedSide(
                ids=np.array([*prompt, *ids, *last], dtype=np.int32),
                num_prompt=len(prompt),
                byte_ends=np.array([*ends, *([len(draft.text.encode())] * len(last))], dtype=np.int32),
            )
        )
    own, *teachers = encoded
    teacher, others = teachers[0] if teachers else None, tuple(teachers[1:])
    return EncodedRow(draft.example.index, draft.text, own, teacher, others, draft.truncated)


def _check_report(
    report: dict[str, list[int]],
    first_error: dict[str, str],
    num_examples: int,
    num_kept: int,
    invalid_rows: str,
    source: str,
    mend: str,
) -> None:
    fixes = {PROMPT_TOO_LONG: "raise data.max_prompt_length or ", EMPTY_RESPONSE: "correct the data or "}
    counts = ", ".join(f"{reason}: {len(rows)}" for reason, rows in report.items())
    for reason, rows in report.items():
        if invalid_rows == "error" and reason != NOTHING_SUPERVISED:
            raise UserError(
                f"{first_error[reason]} ({len(rows)} of {num_examples} rows have this error); "
                f"{fixes.get(reason, 'correct the data or ')}set data.invalid_rows: skip"
            )
    if num_kept == 0:
        fix = first_error.get(REFUSED, mend)
        raise UserError(f"{source}: none of its {num_examples} rows can be used ({counts or 'no rows found'}); {fix}")
    if report:
        logger.warning("%s: skipping %d of %d rows (%s)", source, num_examples - num_kept, num_examples, counts)
