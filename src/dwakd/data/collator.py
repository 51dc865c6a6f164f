"""Batches of rows that are encoded on both sides (`dwakd.data.pairs`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dwakd.errors import UserError

NO_TOKEN = -2
"""Pads `teacher_aligned_rows`, in which -1 is a student token that is aligned with no teacher token."""


class PairedCollator:
    """Turns items of `EncodedPairs` into a batch, padded on the right.

    Args:
        student_pad_id: pads the student's input and target ids; masked, so any valid id will do.
        teacher_pad_id: the teacher's; None when there is no teacher.
        pad_to_multiple_of: rounds both lengths up.

    Returns:
        Of a call: `example_ids (batch,)` and, under the prefixes `student_` and `teacher_`, `input_ids`,
        `attention_mask`, `target_ids`, `byte_ends` (long) and `response_mask` (bool), each (batch, length).
        Position i predicts target i; `response_mask` is True where that target is a supervised response token,
        the end token included; `byte_ends` is 0 elsewhere. Beside them the lists `num_tokens` and `num_rows`, how
        often `attention_mask` and `response_mask` are True in each example: what the host knows it need not ask a GPU.
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
    """A batch for several teachers: that of the first, and in `others` a batch for each of the rest.

    Args:
        collators: one per teacher.
    """

    def __init__(self, collators: Sequence[Callable[[list[dict[str, Any]]], dict[str, Any]]]) -> None:
        self.collators = list(collators)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        first, *rest = self.collators
        others = [collate([feature["others"][k] for feature in features]) for k, collate in enumerate(rest)]
        return {**first(features), "others": others}
