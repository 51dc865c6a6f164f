"""Collate encoded rows (`dwakd.data.pairs`) into padded batches for student and teachers."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from dwakd.batch import PairedBatch, TokenBatch

FindPlace = Callable[[int, dict[str, Any]], int]
"""Find the index of a row in the cache of a teacher, given the row's example id and its features for this teacher."""


def collate(features: Sequence[dict[str, Any]], find_places: Sequence[FindPlace | None] = ()) -> PairedBatch:
    """Collate items of `EncodedPairs` into one batch.

    Rows are padded on the right with token 0. Padding is masked, so any token is correct.

    Args:
        features: the items.
        find_places: for each teacher, the function that sets `TokenBatch.cache_places`, or None without a cache.
    """
    ids = tuple(feature["example_id"] for feature in features)
    chosen: list[Any] = [feature.get("chosen") for feature in features]
    sides = list(zip(*(feature["teachers"] for feature in features), strict=True))
    finds = find_places or [None] * len(sides)
    return PairedBatch(
        student=_pad(ids, [feature["student"] for feature in features], None),
        teachers=tuple(
            _pad([i if own in (None, k) else None for i, own in zip(ids, chosen, strict=True)], side, find)
            for k, (side, find) in enumerate(zip(sides, finds, strict=True))
        ),
        example_ids=ids,
        chosen=None if None in chosen else tuple(chosen),
    )


def separate(batch: PairedBatch) -> list[dict[str, Any]]:
    """Return the items from which `collate` made a batch, without their `aligned_rows`."""
    sides = [_rows(tokens) for tokens in batch]
    chosen = batch.chosen or [None] * len(batch)
    return [
        {"example_id": example_id, "chosen": own, "student": student, "teachers": teachers}
        for example_id, own, (student, *teachers) in zip(
            batch.example_ids, chosen, zip(*sides, strict=True), strict=True
        )
    ]


def _rows(tokens: TokenBatch) -> list[dict[str, list[Any]]]:
    names = ("input_ids", "target_ids", "response_mask", "byte_ends")
    columns = [getattr(tokens, name).tolist() for name in names]
    return [
        {name: values[:count] for name, values in zip(names, row, strict=True)}
        for count, *row in zip(tokens.num_tokens, *columns, strict=True)
    ]


def _padded(width: int, rows: Iterable[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _pad(ids: Sequence[int | None], side: Sequence[dict[str, Any]], find: FindPlace | None) -> TokenBatch:
    """Pad the rows of one model. Rows without an id are not in its cache."""
    num_tokens = tuple(len(row["input_ids"]) for row in side)
    padded = partial(_padded, max(num_tokens))
    aligned = [index for row in side for index in row.get("aligned_rows") or ()]
    fields: dict[str, Any] = {
        name: padded(row[name] for row in side) for name in ("input_ids", "target_ids", "byte_ends")
    }
    return TokenBatch(
        **fields,
        attention_mask=padded([1] * count for count in num_tokens),
        response_mask=padded(row["response_mask"] for row in side).bool(),
        num_tokens=num_tokens,
        num_rows=tuple(sum(row["response_mask"]) for row in side),
        aligned_rows=torch.tensor(aligned) if aligned else None,
        cache_places=find and tuple(-1 if i is None else find(i, row) for i, row in zip(ids, side, strict=True)),
    )
