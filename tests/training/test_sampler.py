"""Test which rows each step gets, in one process and in several."""

from unittest.mock import Mock

import pytest
import torch
from accelerate.state import GradientState
from transformers import TrainingArguments

from dwakd.batch import PairedBatch, TokenBatch
from dwakd.training.sampler import BLOCK_STEPS, LengthGroupedSampler, cut_repeats


def batch(size: int) -> PairedBatch:
    ids = torch.arange(3 * size).view(size, 3)
    tokens = TokenBatch(ids, torch.ones_like(ids), ids, ids > -1, ids, (3,) * size, (3,) * size)
    return PairedBatch(tokens, (tokens,), tuple(range(size)))


@pytest.mark.parametrize(("rank", "kept", "weight"), [(0, 4, 1.0), (1, 1, 1.0), (2, 1, 0.0)])
def test_rows_that_fill_the_last_step_are_cut(rank, kept, weight):
    """Rows that accelerate repeats to fill the last batches are removed, because they would count twice in the loss."""
    state = Mock(spec=GradientState, end_of_dataloader=True, remainder=5)
    args = Mock(spec=TrainingArguments, world_size=3, process_index=rank)
    whole = [batch(4), batch(4)]
    first, last = cut_repeats(whole, state, args)
    assert (len(first), first.weight) == (4, 1.0)
    assert (len(last), last.weight) == (kept, weight)
    assert last.teachers[0].input_ids.shape == (kept, 3)
    assert len(whole[1]) == 4
    assert cut_repeats(whole, Mock(spec=GradientState, end_of_dataloader=False, remainder=5), args) is whole


def test_steps_have_rows_of_like_length_and_epochs_differ():
    """Each epoch contains every row once, in steps of similar length, in an order that depends on seed and epoch only."""
    lengths = torch.randint(1, 500, (4 * BLOCK_STEPS + 3,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler, again, later = (LengthGroupedSampler(lengths, 4, 1, lambda epoch=epoch: epoch) for epoch in (0, 0, 1))
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(again)
    steps = [sorted(lengths[row] for row in order[i : i + 4]) for i in range(0, 4 * BLOCK_STEPS, 4)]
    assert sum(step[-1] - step[0] for step in steps) / len(steps) < 20
    assert list(later) != order
