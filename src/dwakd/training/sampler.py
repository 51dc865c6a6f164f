"""Choose the rows of each step: group rows of similar length, remove rows that fill the last step, and split by tokens."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.state import GradientState
from jaxtyping import Int
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
        limit: largest number of tokens of a micro-batch, for the student and all teachers. With `chosen`, a teacher's tokens
            are those of the rows that it teaches.
        gather: concatenates the tensors of all ranks, if there are several.
        packed: whether the models run the rows of a micro-batch without padding. Otherwise padding counts.
    """
    whole = PairedBatch.concatenate([batch for batch in batches if batch.weight] or batches[:1])
    lengths = torch.tensor([side.num_tokens for side in (whole.student, *whole.teachers)])
    if whole.chosen is not None:
        lengths[1:] *= torch.arange(len(whole.teachers))[:, None] == torch.tensor(whole.chosen)
    order = lengths.sum(0).argsort(stable=True)
    ends = _micro_batch_ends(lengths[:, order], limit, packed=packed)
    parts = [whole.examples(rows.tolist()) for rows in order.tensor_split(ends[:-1])]
    count = torch.tensor([len(parts)], device=whole.student.input_ids.device)
    missing = 0 if gather is None else int(gather(count).max()) - len(parts)
    return [*parts, *[dataclasses.replace(whole.examples(order[:1].tolist()), weight=0.0)] * missing]


def _micro_batch_ends(lengths: Int[Tensor, "models rows"], limit: int, *, packed: bool) -> list[int]:
    """Divide consecutive rows into micro-batches, each of one row or of at most `limit` tokens; return where they end.

    The total of all tokens, plus a fixed number for each micro-batch, is minimal. It is found by dynamic programming over
    the last row of a micro-batch. The fixed number is an eighth of `limit`, because small micro-batches use a device badly.
    """
    num_rows = lengths.shape[1]
    starts, costs = [0] * (num_rows + 1), torch.zeros(num_rows + 1, dtype=torch.double)
    for end in range(1, num_rows + 1):
        longest_first = lengths[:, :end].flip(1)
        counts, widths = (longest_first > 0).cumsum(1), longest_first.cummax(1).values
        tokens = (longest_first.cumsum(1) if packed else counts * widths).sum(0).flip(0)
        tokens[: end - 1].masked_fill_(tokens[: end - 1] > limit, sys.maxsize)
        total = costs[:end] + tokens + limit / 8
        starts[end] = int(total.argmin())
        costs[end] = total[starts[end]]
    ends = [num_rows]
    while starts[ends[0]]:
        ends.insert(0, starts[ends[0]])
    return ends
