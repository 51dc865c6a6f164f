"""Choose the rows of each step: group rows of similar length, remove rows that fill the last step, and split by tokens."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.state import GradientState
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from dwakd.batch import PairedBatch

BLOCK_STEPS = 50
"""Number of steps within which rows are sorted: enough to save most padding, few enough to keep the mixture of rows."""


class LengthGroupedSampler(Sampler[int]):
    """Shuffle rows, sort them by length within blocks of fifty steps, and shuffle the steps.

    The sampler of transformers draws from the global random state, so that a resumed epoch would have another order, and
    leaves every block sorted, so that each ends with the shortest rows.

    Args:
        lengths: number of tokens of each row.
        step_size: rows of one optimiser step, over accumulation and ranks. The steps do not depend on how it is split.
        seed: seed of the order.
        epoch: returns the current epoch, on which the order depends. A resumed data loader does not set the epoch.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.step_size, self.seed, self.epoch = lengths, step_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000003 * self.seed + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        full = len(order) - len(order) % self.step_size  # the incomplete step remains the last one
        steps = []
        for start in range(0, full, BLOCK_STEPS * self.step_size):
            block = order[start : min(start + BLOCK_STEPS * self.step_size, full)]
            block.sort(key=lambda row: self.lengths[row])
            steps += [block[i : i + self.step_size] for i in range(0, len(block), self.step_size)]
        for index in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[index]
        yield from order[full:]


def cut_repeats(batches: list[PairedBatch], state: GradientState, args: TrainingArguments) -> list[PairedBatch]:
    """Remove the rows with which accelerate fills the ranks' last batches.

    A batch without other rows keeps one row and has weight 0, because all ranks must take part in each step.
    """
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batches
    *others, last = batches
    kept = min(max(state.remainder - args.process_index * len(last), 0), len(last))
    return [*others, dataclasses.replace(last.examples(range(max(kept, 1))), weight=float(kept > 0))]


def split_by_tokens(
    batches: list[PairedBatch], limit: int, gather: Callable[[Tensor], Tensor] | None, *, packed: bool = False
) -> list[PairedBatch]:
    """Divide the rows of an optimiser step into micro-batches of similar length and at most `limit` tokens.

    A row with more tokens than `limit` is the only row of its micro-batch. A rank with fewer micro-batches than others
    repeats its shortest row with weight 0, because all ranks must take part in each micro-batch.

    Args:
        batches: the batches of the step.
        limit: largest value of `count_tokens` of a micro-batch.
        gather: concatenates the tensors of all ranks, if there are several.
        packed: whether the models run the rows of a micro-batch without padding.
    """
    whole = PairedBatch.concatenate([batch for batch in batches if batch.weight] or batches[:1])
    parts: list[list[int]] = []
    for row in sorted(range(len(whole)), key=lambda row: count_tokens(whole, [row])):
        if parts and count_tokens(whole, [*parts[-1], row], packed=packed) <= limit:
            parts[-1].append(row)
        else:
            parts.append([row])
    count = torch.tensor([len(parts)], device=whole.student.input_ids.device)
    missing = 0 if gather is None else int(gather(count).max()) - len(parts)
    empty = dataclasses.replace(whole.examples(parts[0][:1]), weight=0.0)
    return [*map(whole.examples, parts), *[empty] * missing]


def count_tokens(batch: PairedBatch, rows: Sequence[int], *, packed: bool = False) -> int:
    """Return the number of tokens of these rows as one batch, for the student and all teachers; padding counts unless `packed`.

    With `chosen`, a teacher's tokens are those of the rows that it teaches.
    """
    lengths = [[batch.student.num_tokens[row] for row in rows]]
    for index, teacher in enumerate(batch.teachers):
        lengths.append([teacher.num_tokens[row] for row in rows if batch.chosen is None or batch.chosen[row] == index])
    return sum(sum(own) if packed else len(own) * max(own, default=0) for own in lengths)
