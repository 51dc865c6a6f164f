"""Collate encoded rows (`dwakd.data.pairs`) into padded batches for student and teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dwakd.errors import UserError

NO_TOKEN = -2
"""Padding value of `teacher_aligned_rows`, in which -1 marks an unmatched student token."""


class PairedCollator:
    """Collate items of `EncodedPairs` into a batch with padding on the right.

    Args:
        student_pad_id: padding of the student's input and target ids. It is masked, so any valid id can be used.
        teacher_pad_id: padding of the teacher's ids; None if there is no teacher.
        pad_to_multiple_of: round the lengths of both sides up to a multiple of this number.

    Returns:
        A call returns a dict with `example_ids (batch,)` and, with the prefixes `student_` and `teacher_`, `input_ids`,
        `attention_mask`, `target_ids`, `byte_ends` (long) and `response_mask` (bool), each (batch, length).
        Position i predicts target i. `response_mask` is True where this target is a supervised response token, the end
        token included; `byte_ends` is 0 elsewhere. The lists `num_tokens` and `num_rows` contain the number of True
        values of `attention_mask` and `response_mask` of each example, so that they need not be read from a GPU.
        `teacher_aligned_rows`, if the rows have it, is (batch, student response tokens), padded with `NO_TOKEN`.
    """

    def __init__(self, student_pad_id: int, teacher_pad_id: int | None = None, *, pad_to_multiple_of: int = 1) -> None:
        assert pad_to_multiple_of >= 1
        self.pad_ids = {"student": student_pad_id, "teacher": teacher_pad_id}
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"example_ids": torch.tensor([feature["example_id"] for feature in features])}
        for side, pad_id in self.pad_ids.items():
            if f"{side}_input_ids" in features[0]:
                if pad_id is None:
                    raise UserError("the rows have a teacher side: give PairedCollator a teacher_pad_id")
                batch |= self._pad_side(features, side, pad_id)
        return batch

    def _pad_side(self, features: Sequence[dict[str, Any]], side: str, pad_id: int) -> dict[str, Any]:
        lengths = [len(feature[f"{side}_input_ids"]) for feature in features]
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills: dict[str, Any] = {"input_ids": pad_id, "target_ids": pad_id, "response_mask": False, "byte_ends": 0}
        padded: dict[str, Any] = {
            f"{side}_{field}": torch.tensor(
                [row + [fill] * (width - len(row)) for row in (feature[f"{side}_{field}"] for feature in features)]
            )
            for field, fill in fills.items()
        }
        padded[f"{side}_attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        padded[f"{side}_num_tokens"] = lengths
        if f"{side}_aligned_rows" in features[0]:
            rows = [torch.tensor(feature[f"{side}_aligned_rows"]) for feature in features]
            padded[f"{side}_aligned_rows"] = pad_sequence(rows, batch_first=True, padding_value=NO_TOKEN)
        padded[f"{side}_num_rows"] = [sum(feature[f"{side}_response_mask"]) for feature in features]
        return padded


class SeveralCollators:
    """Collate a batch for several teachers: the batch of the first, with those of the others in the list `others`.

    Args:
        collators: one collator per teacher.
    """

    def __init__(self, collators: Sequence[Callable[[list[dict[str, Any]]], dict[str, Any]]]) -> None:
        self.collators = list(collators)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        first, *rest = self.collators
        others = [collate([feature["others"][k] for feature in features]) for k, collate in enumerate(rest)]
        return {**first(features), "others": others}
