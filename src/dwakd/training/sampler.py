"""Which rows make a step: batches of like length, and no row twice where ranks share the last step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

BLOCK_STEPS = 50
"""Rows are sorted within this many steps: enough to save the padding, few enough to keep the mixture."""


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows, sorts them by length within blocks of fifty steps, and shuffles the steps.

    transformers' own draws from the global random state, so that a resumed epoch would be another one, and leaves
    every block sorted, so that each ends on the shortest rows.

    Args:
        lengths: tokens per row.
        step_size: rows of one optimiser step over accumulation and ranks: split differently, the steps stay the same.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; another epoch is another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        full = len(order) - len(order) % self.step_size  # the incomplete step stays last
        steps = []
        for start in range(0, full, BLOCK_STEPS * self.step_size):
            block = order[start : min(start + BLOCK_STEPS * self.step_size, full)]
            block.sort(key=lambda row: self.lengths[row])
            steps += [block[i : i + self.step_size] for i in range(0, len(block), self.step_size)]
        for index in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[index]
        yield from order[full:]


def cut_repeats(batches: list[dict[str, Any]], state: GradientState, args: TrainingArguments) -> None:
    """Cut the rows with which accelerate fills up the ranks' last batches; a batch of nothing else has share 0."""
    for batch in batches:
        batch["share"] = 1.0
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return
    last = batches[-1]
    size = len(last["example_ids"])
    kept = min(max(state.remainder - args.process_index * size, 0), size)
    last["share"] = float(kept > 0)
    for part in (last, *last.get("others", ())):
        for name, value in part.items():
            if isinstance(value, Tensor):
                part[name] = value[: max(kept, 1)]
