"""On-policy distillation: the current student answers some of the prompts of each optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from dwakd.batch import PairedBatch
from dwakd.data.collator import collate, separate
from dwakd.data.encoded import EncodedSide
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import response_room
from dwakd.errors import UserError
from dwakd.evaluation.generate import Generated, Model, PromptBatch, generate_batch, group_prompts, streams
from dwakd.evaluation.metrics import repeated_sequences
from dwakd.evaluation.options import GenerationOptions
from dwakd.models.rows import evaluating
from dwakd.recipe.training import DistillConfig

CHOICE, TOKENS = 1, 2
"""Purposes of random numbers, so that the choice of a prompt and its answer are independent."""


def check_end_tokens(args: DistillConfig, encoders: Sequence[TextEncoder]) -> None:
    """Raise UserError if the student is to answer prompts and a teacher ends its answers with another token.

    `encoders` begins with the student's. A method that compares probabilities token by token would train the student to
    write the teacher's end token. If the student's answers do not end there, they become longer and longer.
    """
    if not args.lmbda:
        return
    own = encoders[0]
    for encoder in encoders[1:]:
        if args.method_options.needs_same_vocabulary and encoder.end_token_id not in own.end_token_ids:
            theirs, ours = (side.tokenizer.convert_ids_to_tokens(side.end_token_id) for side in (encoder, own))
            raise UserError(
                f"training.lmbda: the teacher ends its answers with {theirs!r} and the student with {ours!r}, so the "
                "student's answers would not end: use data.template=plain, or models with the same chat template"
            )


class StudentAnswers:
    """Answer the share `lmbda` of the prompts with the student.

    A prompt is chosen and answered with random numbers that depend on the seed, the optimiser step and the row only, so
    that a resumed run, other batch sizes and other numbers of ranks give the same answers.

    Args:
        args: the training arguments.
        encoders: the encoder of the student, then that of each teacher.
        counts: count the answers.
    """

    def __init__(self, args: DistillConfig, encoders: Sequence[TextEncoder], counts: "AnswerCounts") -> None:
        self.args, self.counts = args, counts
        self.encoder = AnswerEncoder(encoders, args.max_length, args.max_prompt_length)

    def replace(self, batches: Sequence[PairedBatch], student: Model, step: int) -> list[PairedBatch]:
        """Return the micro-batches of a step, in which the student has answered the chosen prompts.

        The answered rows of a batch are its last ones, and their number is its `num_sampled`.
        """
        rows = [row for batch in batches for row in separate(batch)]
        ids = [row["example_id"] for row in rows]
        draws = streams((self.args.seed, step, CHOICE), ids, 1, torch.device("cpu"))[:, 0]
        chosen = (draws < self.args.lmbda).nonzero()[:, 0].tolist()
        answered = dict(zip(chosen, self._answer([rows[place] for place in chosen], student, step), strict=True))
        replaced, start = [], 0
        for batch in batches:
            places = range(start, start := start + len(batch))
            sampled = [answered[place] for place in places if place in answered]
            if batch.weight:
                self.counts.add(sampled)
            given = [rows[place] for place in places if place not in answered]
            new = collate([*given, *(row.features for row in sampled)])
            replaced.append(replace(new, weight=batch.weight, num_sampled=len(sampled)))
        return replaced

    def _answer(self, rows: list[dict[str, Any]], student: Model, step: int) -> list["AnsweredRow"]:
        """Sample the answers to the prompts of these rows."""
        args = self.args
        prompts = [[_prompt(side) for side in (row["student"], *row["teachers"])] for row in rows]
        limits = [min(args.max_new_tokens, args.max_length - len(own)) for own, *_ in prompts]
        options = GenerationOptions(seed=args.seed, temperature=args.sampling_temperature)
        base = student.get_base_model() if isinstance(student, PeftModel) else student
        answers: dict[int, AnsweredRow] = {}
        with evaluating(student):
            for batch in group_prompts(base, [own for own, *_ in prompts], limits, args.per_device_eval_batch_size):
                ids = [rows[place]["example_id"] for place in batch.rows]
                found = self._sample(base, batch, options, ids, step)
                for place, example_id, answer in zip(batch.rows, ids, found, strict=True):
                    row = self.encoder.encode(example_id, prompts[place], answer)
                    answers[place] = replace(row, features=row.features | {"chosen": rows[place]["chosen"]})
        return [answers[place] for place in range(len(rows))]

    def _sample(
        self, model: Any, batch: PromptBatch, options: GenerationOptions, ids: list[int], step: int
    ) -> list[Generated]:
        uniforms = streams((self.args.seed, step, TOKENS), ids, batch.max_new_tokens, model.device)
        return generate_batch(model, self.encoder.encoders[0], batch, options, uniforms)


@dataclass(frozen=True)
class AnsweredRow:
    """A row whose response the student sampled.

    Args:
        features: the row as an item for `collate`.
        ids: the student's answer without an end token.
        ended: whether the answer ends with an end token. If not, it was cut.
    """

    features: dict[str, Any]
    ids: list[int]
    ended: bool


class AnswerEncoder:
    """Encode the student's answers for all models.

    The student keeps the sampled token ids. Teachers with the same vocabulary read these ids, and the others read the text. If
    a teacher has no room for all of it, the answer is cut after the last token of the student that fits. It is also cut
    before a token that the tokenizer does not have, as heads may have more entries. An answer that is cut has no end token,
    and does not end inside a character. If no token is left on some side, all sides get an empty answer, whose only token is
    the end token.

    Args:
        encoders: the encoder of the student, then that of each teacher.
        max_length: maximum number of tokens of each side.
        max_prompt_length: maximum number of tokens of a prompt that a teacher shares with the student.
    """

    def __init__(self, encoders: Sequence[TextEncoder], max_length: int, max_prompt_length: int) -> None:
        self.encoders, self.limits = encoders, (max_length, max_prompt_length)
        own, *others = (encoder.tokenizer.get_vocab() for encoder in encoders)
        self._known, self._same = set(own.values()), [vocab == own for vocab in others]

    def encode(self, example_id: int, prompts: list[list[int]], answer: Generated) -> AnsweredRow:
        """Encode an answer to a prompt, which is given as the token ids of each model."""
        known = list(takewhile(self._known.__contains__, answer.ids))
        ended = answer.ended and len(known) == len(answer.ids)
        ids = known if ended else self._whole(known)
        rooms = [response_room(len(prompt), *self.limits) for prompt in prompts[1:]]
        text, parts = self._read(ids)
        ended = ended and all(len(part) < room for (part, _), room in zip(parts[1:], rooms, strict=True))
        while cuts := [
            max(0, *ends[:room]) for (part, ends), room in zip(parts[1:], rooms, strict=True) if len(part) > room
        ]:
            fitting = [count for count, end in enumerate(parts[0][1], start=1) if 0 <= end <= min(cuts)]
            ids = self._whole(ids[: min(max(fitting, default=0), len(ids) - 1)])
            text, parts = self._read(ids)
        with_end = ended
        if not all(part for part, _ in parts):
            text, parts, with_end = "", [([], []) for _ in parts], True
        sides = []
        for encoder, prompt, (part, ends) in zip(self.encoders, prompts, parts, strict=True):
            last, last_end = ([encoder.end_token_id], [len(text.encode())]) if with_end else ([], [])
            whole, byte_ends = (np.array(n, dtype=np.int32) for n in ([*prompt, *part, *last], [*ends, *last_end]))
            sides.append(EncodedSide(whole, len(prompt), byte_ends).features())
        return AnsweredRow({"example_id": example_id, "student": sides[0], "teachers": sides[1:]}, ids, ended)

    def _whole(self, ids: list[int]) -> list[int]:
        """Leave out the last tokens, at most three, if their text ends with the replacement character of incomplete bytes."""
        decode = partial(
            self.encoders[0].tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        shorter = (ids[: len(ids) - count] for count in range(min(len(ids), 3) + 1))
        return next((part for part in shorter if not decode(part).endswith("\ufffd")), ids)

    def _read(self, ids: list[int]) -> tuple[str, list[tuple[list[int], list[int]]]]:
        """Return the text of the student's tokens, and for each model the tokens and byte ends that it reads."""
        own, *others = self.encoders
        text, ends = own.spelling(ids)
        theirs = (
            (ids, ends) if same else other.response_ids(text) for other, same in zip(others, self._same, strict=True)
        )
        return text, [(ids, ends), *theirs]


class AnswerCounts:
    """Count what the logs say about the student's answers."""

    def __init__(self) -> None:
        self.values = [0] * 6

    def add(self, rows: Sequence[AnsweredRow]) -> None:
        """Count the answers of these rows."""
        for row in rows:
            new = (1, len(row.ids), not row.ended, row.ended and not row.ids, *repeated_sequences(row.ids))
            self.values = [total + int(value) for total, value in zip(self.values, new, strict=True)]

    def take(self) -> list[int]:
        """Return the counts and start again."""
        values, self.values = self.values, [0] * 6
        return values


def answer_metrics(counts: Tensor) -> dict[str, float]:
    """Return the logged values for counts of `AnswerCounts`, summed over ranks; nothing if there are no answers."""
    answers, tokens, cut, empty, repeated, sequences = counts.tolist()
    if not answers:
        return {}
    shares = {"mean_length": tokens, "clipped_ratio": cut, "empty_ratio": empty}
    metrics = {name: value / answers for name, value in shares.items()} | {"repetition": repeated / max(sequences, 1)}
    return {f"completions/{name}": value for name, value in metrics.items()}


def _prompt(side: dict[str, Any]) -> list[int]:
    """Return the token ids of the prompt of an encoded row. The last one is read at the first response position."""
    ids: list[int] = side["input_ids"]
    return ids[: len(ids) - sum(side["response_mask"]) + 1]
