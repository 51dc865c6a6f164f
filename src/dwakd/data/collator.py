"""Collate encoded rows (`dwakd.data.pairs`) into padded batches for student and teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dwakd.batch import PairedBatch, TokenBatch

FindPlace = Callable[[dict[str, Any]], int]
"""Find the index of a row in the cache of a teacher, given the row's features for this teacher."""


def collate(features: Sequence[dict[str, Any]], find_places: Sequence[FindPlace | None] = ()) -> PairedBatch:
    """Collate items of `EncodedPairs` into one batch.

    Rows are padded on the right with token 0. Padding is masked, so any token is correct.

    Args:
        features: the items.
        find_places: for each teacher, the function that sets `TokenBatch.cache_places`, or None without a cache.
    """
    others = [[feature["others"][k] for feature in features] for k in range(len(features[0].get("others", ())))]
    sides = [features, *others] if "teacher_input_ids" in features[0] else []
    return PairedBatch(
        student=_pad(features, "student"),
        teachers=tuple(
            _pad(side, "teacher", find) for side, find in zip(sides, find_places or [None] * len(sides), strict=True)
        ),
        example_ids=tuple(feature["example_id"] for feature in features),
    )


def _pad(features: Sequence[dict[str, Any]], side: str, find: FindPlace | None = None) -> TokenBatch:
    num_tokens = tuple(len(feature[f"{side}_input_ids"]) for feature in features)
    width = max(num_tokens)

    def padded(field: str) -> torch.Tensor:
        rows = (feature[f"{side}_{field}"] for feature in features)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    aligned = [index for feature in features for index in feature.get(f"{side}_aligned_rows", ())]
    return TokenBatch(
        input_ids=padded("input_ids"),
        attention_mask=torch.tensor([[1] * count + [0] * (width - count) for count in num_tokens]),
        target_ids=padded("target_ids"),
        response_mask=padded("response_mask").bool(),
        byte_ends=padded("byte_ends"),
        num_tokens=num_tokens,
        num_rows=tuple(sum(feature[f"{side}_response_mask"]) for feature in features),
        aligned_rows=torch.tensor(aligned) if aligned else None,
        cache_places=None if find is None else tuple(map(find, features)),
    )
