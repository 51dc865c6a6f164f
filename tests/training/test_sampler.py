"""Test which rows each step gets, in one process and in several."""

from itertools import pairwise, product
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import GradientState
from transformers import TrainingArguments

from dwakd.batch import PairedBatch, TokenBatch
from dwakd.training.sampler import BLOCK_STEPS, LengthGroupedSampler, cut_repeats, split_by_tokens


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


def rows(lengths: list[int], start: int = 0, **options) -> PairedBatch:
    """Return a batch whose teachers read one and two tokens more than the student. The last token is the response."""
    sides = []
    for extra in range(3):
        counts = tuple(length + extra for length in lengths)
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        ids = torch.where(mask, 100 * (start + torch.arange(len(lengths)))[:, None] + torch.arange(max(counts)), 0)
        last = torch.arange(max(counts)) == torch.tensor(counts)[:, None] - 1
        sides.append(TokenBatch(ids, mask.long(), ids, last, ids, counts, (1,) * len(lengths)))
    return PairedBatch(sides[0], tuple(sides[1:]), tuple(range(start, start + len(lengths))), **options)


def count_tokens(part: PairedBatch, *, packed: bool = False) -> int:
    """Count the tokens of the student and of each teacher of the rows, with padding unless `packed`."""
    lengths = [list(part.student.num_tokens)]
    for teacher, side in enumerate(part.teachers):
        lengths.append(
            [n for row, n in enumerate(side.num_tokens) if part.chosen is None or part.chosen[row] == teacher]
        )
    return sum(sum(own) if packed else len(own) * max(own, default=0) for own in lengths)


def test_micro_batches_have_at_most_the_given_tokens():
    """Rows of several batches are mixed, a long row stays alone, and all ranks get the same number of micro-batches."""
    batches = [rows([5, 40, 6], num_sampled=1), rows([9, 4], start=3), rows([7], start=5, weight=0.0)]
    parts = split_by_tokens(batches, 60, lambda count: torch.cat([count, count + 2]))
    assert [part.example_ids for part in parts] == [(4,), (0, 2), (3,), (1,), (4,), (4,)]
    assert [count_tokens(part) for part in parts] == [15, 42, 30, 123, 15, 15]
    packed = split_by_tokens(batches, 60, None, packed=True)
    assert [part.example_ids for part in packed] == [(4, 0), (3, 2), (1,)], "33, 51 and 123 tokens, without padding"
    assert [part.weight for part in parts] == [1, 1, 1, 1, 0, 0]
    assert [part.num_sampled for part in parts] == [0, 1, 0, 0, 0, 0]
    for got, expected in zip(parts[2], rows([9]), strict=True):
        assert torch.equal(got.input_ids[0], expected.input_ids[0] + 300), "the first of the rows has the longest input"
        assert got.attention_mask.sum(1).tolist() == list(got.num_tokens)
    chosen = [rows([9, 4, 5], chosen=(0, 1, 1)), rows([3], start=3, chosen=(0,))]
    (part,) = split_by_tokens(chosen, 200, None)
    assert (part.example_ids, part.chosen) == ((3, 1, 2, 0), (0, 1, 1, 0))
    assert count_tokens(part) == 4 * 9 + 2 * 10 + 2 * 7


@pytest.mark.parametrize("limit", [30, 200, 2000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chosen", [None, (0, 1, 1, 0, 1, 0, 0, 1)])
def test_micro_batches_have_the_least_padding(limit, chosen, packed):
    """No other division of the sorted rows has fewer tokens, if each micro-batch counts an eighth of the limit more."""
    generator = torch.Generator().manual_seed(limit)
    batch = rows(torch.randint(1, 60, (8,), generator=generator).tolist(), chosen=chosen)
    (ordered,) = split_by_tokens([batch], 10**9, None)

    def cost(parts: list[PairedBatch]) -> float:
        return sum(count_tokens(part, packed=packed) + limit / 8 for part in parts)

    divisions = []
    for cuts in product([False, True], repeat=7):
        ends = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), 8]
        parts = [ordered.examples(range(*pair)) for pair in pairwise(ends)]
        if all(len(part) == 1 or count_tokens(part, packed=packed) <= limit for part in parts):
            divisions.append(cost(parts))
    assert cost(split_by_tokens([batch], limit, None, packed=packed)) == min(divisions)
    assert len(set(divisions)) > 1 or limit == 30
