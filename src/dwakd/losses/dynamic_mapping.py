"""Functions of CDM that run in every step: groups of positions, candidate tokens and their counterparts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dwakd.align.vocab import CandidateMatcher, token_text
from dwakd.batch import ModelSide
from dwakd.losses.pair import ModelPair
from dwakd.losses.sides import example_ids

UNMATCHED = -1
SPECIAL = "\0"
BLOCK = 16

Columns = Float[Tensor, "vocab rows"]
PerRow = Float[Tensor, " rows"]
Ids = Int[Tensor, "groups _"]


class TokenMap(nn.Module):
    """Find a token's counterpart in the other vocabulary: the token of equal spelling, else the nearest candidate.

    Args:
        pair: vocabularies and heads of the two models. Padding of a head and tokens that it forbids have no counterpart.
        threshold: a candidate without an equal token is matched with the nearest candidate without one if their edit
            distance divided by the sum of their lengths, both without spaces, is below this value.
    """

    student_of: Int[Tensor, " t_vocab"]
    teacher_of: Int[Tensor, " s_vocab"]

    def __init__(self, pair: ModelPair, threshold: float) -> None:
        super().__init__()
        student_ids, teacher_ids = pair.shared_tokens()
        possible = pair.possible_tokens()
        unmatched, self.spelled = [], []
        for name, head, tokens, allowed, ids, counterparts in (
            ("teacher_of", pair.student_head, pair.student_tokens, possible[0], student_ids, teacher_ids),
            ("student_of", pair.teacher_head, pair.teacher_tokens, possible[1], teacher_ids, student_ids),
        ):
            twins = torch.full((head.vocab_size,), UNMATCHED).index_copy(0, ids, counterparts)
            self.register_buffer(name, twins, persistent=False)
            texts, candidates = (
                [None if token is None else token_text(token).replace(" ", "") for token in side]
                + [None] * (head.vocab_size - len(side))
                for side in (tokens, allowed)
            )
            unmatched.append(
                [text if twin == UNMATCHED else None for text, twin in zip(candidates, twins.tolist(), strict=True)]
            )
            self.spelled.append([SPECIAL if text is None else text for text in texts])
        self.nearest = CandidateMatcher(unmatched[0], unmatched[1], threshold)

    def read_texts(self, sides: Sequence[ModelSide]) -> list[list[str]]:
        """Return the text of the token that is read at each position, without its spaces.

        The token read at an example's first position belongs to the prompt and is replaced by a marker.
        """
        texts = []
        for side, spelled in zip(sides, self.spelled, strict=True):
            read = [SPECIAL, *(spelled[token] for token in side.target_ids.tolist()[:-1])]
            for first in (side.lengths.cumsum(0) - side.lengths).tolist():
                read[first] = SPECIAL
            texts.append(read)
        return texts

    def pairs(self, student: Ids, teacher: Ids) -> tuple[list[Ids], Bool[Tensor, "groups pairs"]]:
        """Pair the candidates of both models with their counterparts.

        Args:
            student: the student's candidates of each group, in descending order of probability.
            teacher: the teacher's candidates of each group, in descending order of probability.

        Returns:
            Student tokens and teacher tokens of the pairs, first for the teacher's candidates, then for the student's; and a
            mask of the valid pairs. A candidate without a counterpart and a repeated pair are not valid.
        """
        nearest = self.nearest(student.cpu().numpy(), teacher.cpu().numpy())
        student_for, teacher_for = (
            torch.where(twins == UNMATCHED, torch.from_numpy(found).to(twins.device), twins)
            for twins, found in zip((self.student_of[teacher], self.teacher_of[student]), nearest, strict=True)
        )
        pairs = [torch.cat([student_for, student], 1), torch.cat([teacher, teacher_for], 1)]
        keys = torch.split(pairs[0] * len(self.student_of) + pairs[1], [teacher.shape[1], student.shape[1]], dim=1)
        again = (keys[1][:, :, None] == keys[0][:, None, :]).any(-1)
        counts = (pairs[0] != UNMATCHED) & (pairs[1] != UNMATCHED)
        counts[:, teacher.shape[1] :] &= ~again
        return [side.clamp(min=0) for side in pairs], counts


@dataclass(frozen=True)
class Groups:
    """Groups of consecutive positions of one side.

    Args:
        firsts: the first position of each group.
        sizes: number of positions of each group.
    """

    firsts: Int[Tensor, " groups"]
    sizes: Int[Tensor, " groups"]

    def of_rows(self) -> Int[Tensor, " rows"]:
        """Return the group of each position."""
        return torch.arange(len(self.sizes), device=self.sizes.device).repeat_interleave(self.sizes)

    def mean_columns(self, columns: Columns) -> Float[Tensor, "vocab groups"]:
        """Compute the mean over each group for all tokens."""
        means = columns[:, self.firsts]
        several = self.sizes > 1
        shares = (self.of_rows()[:, None] == several.nonzero().squeeze(1)) / self.sizes[several].to(columns.dtype)
        means[:, several] = columns @ shares
        return means

    def means(self, columns: Columns, ids: Ids) -> Float[Tensor, "groups _"]:
        """Compute the mean over each group for some tokens of each group; differentiable."""
        rows = self.of_rows()
        values = columns.gather(0, ids[rows].t()).t()
        return values.new_zeros(ids.shape).index_add(0, rows, values) / self.sizes[:, None]


def warp(
    entropies: Sequence[Float[Tensor, " _"]], texts: Sequence[Sequence[str]], lengths: Sequence[Int[Tensor, " batch"]]
) -> tuple[list[Groups], Float[Tensor, " groups"]]:
    """Align the positions of both sides by dynamic time warping and cut them into groups.

    Args:
        entropies: entropy at each position of both sides, in nats.
        texts: text of the token read at each position of both sides.
        lengths: tokens per example of both sides, at least 1, on the CPU.

    Returns:
        The groups of the student and of the teacher, and the weight of each group. The weights of an example are equal and
        sum to its student tokens.
    """
    from dwakd.align.edit_distance import edit_costs, warped_runs

    device = entropies[0].device
    sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
    shares = []
    splits = [
        (torch.split(warping_weights(side.cpu(), n), n.tolist()), (n.cumsum(0) - n).tolist())
        for side, n in zip(entropies, lengths, strict=True)
    ]
    (own, own_starts), (other, other_starts) = splits
    for f_s, s, f_t, t in zip(own, own_starts, other, other_starts, strict=True):
        distances = edit_costs(texts[0][s : s + len(f_s)], texts[1][t : t + len(f_t)])
        runs = warped_runs(distances * f_s.numpy()[:, None] * f_t.numpy())
        for side, run in zip(sizes, runs, strict=True):
            side.append(torch.from_numpy(run).long())
        shares.append(torch.full((len(runs[0]),), len(f_s) / len(runs[0]), dtype=entropies[0].dtype))
    joined = [torch.cat(side).to(device) for side in sizes]
    return [Groups(side.cumsum(0) - side, side) for side in joined], torch.cat(shares).to(device)


def warping_weights(entropy: PerRow, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " rows"]:
    """Compute the cost factor f = floor(3 sigmoid(4e - 2) + 3) of each position.

    e is the entropy, scaled so that the smallest of an example is 0 and the largest is 1. If all entropies of an example are
    equal up to rounding, e is 0.
    """
    examples = example_ids(lengths, len(entropy))
    low, high = (
        entropy.new_zeros(len(lengths)).scatter_reduce(0, examples, entropy, bound, include_self=False)[examples]
        for bound in ("amin", "amax")
    )
    constant = high - low <= 16 * torch.finfo(entropy.dtype).eps * high
    share = ((entropy - low) / (high - low)).masked_fill(constant, 0.0)
    return (3 * torch.sigmoid(4 * share - 2) + 3).int()


def top_tokens(columns: Columns, count: int) -> Ids:
    """Find the `count` tokens with the largest logits of each column, in descending order.

    They lie in the blocks with the largest maxima, so only these blocks are searched.
    """
    whole = len(columns) // BLOCK
    if count >= whole:
        return columns.t().topk(min(count, len(columns))).indices
    maxima = columns[: whole * BLOCK].view(whole, BLOCK, -1).amax(1)
    tokens = torch.arange(len(columns), device=columns.device)
    inside = maxima.t().topk(count).indices[:, :, None] * BLOCK + tokens[:BLOCK]
    ids = torch.cat([inside.flatten(1), tokens[whole * BLOCK :].expand(columns.shape[1], -1)], 1)
    return ids.gather(1, columns.gather(0, ids.t()).t().topk(count).indices)
