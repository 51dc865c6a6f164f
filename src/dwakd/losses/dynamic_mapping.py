"""Functions of CDM that run in every step: groups of positions, candidate tokens and their counterparts."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dwakd.align.vocab import CandidateMatcher, token_text
from dwakd.batch import ModelSide
from dwakd.losses.columns import Columns
from dwakd.losses.pair import ModelPair, Tokens
from dwakd.losses.sides import example_ids

UNMATCHED = -1
SPECIAL = "\0"
BLOCK = 16

Ids = Int[Tensor, "groups _"]


class TokenMap(nn.Module):
    """Find a token's counterpart in the other vocabulary: the token of equal spelling, else the nearest candidate.

    Padding of a head and tokens that it forbids have no counterpart. A candidate without an equal token is matched with the
    nearest candidate without one if their edit distance divided by the sum of their lengths, both without spaces, is below
    the threshold.
    """

    student_of: Int[Tensor, " t_vocab"]
    teacher_of: Int[Tensor, " s_vocab"]

    def __init__(self, pair: ModelPair, threshold: float) -> None:
        super().__init__()
        student_ids, teacher_ids = pair.shared_tokens()
        student_possible, teacher_possible = pair.possible_tokens()
        unmatched, self.spelled = [], []
        for name, size, tokens, possible, ids, counterparts in (
            ("teacher_of", pair.vocabularies[0], pair.student_tokens, student_possible, student_ids, teacher_ids),
            ("student_of", pair.vocabularies[1], pair.teacher_tokens, teacher_possible, teacher_ids, student_ids),
        ):
            twins = torch.full((size,), UNMATCHED).index_copy(0, ids, counterparts)
            self.register_buffer(name, twins, persistent=False)
            self.spelled.append([SPECIAL if text is None else text for text in spellings(tokens, size)])
            texts = zip(spellings(possible, size), twins.tolist(), strict=True)
            unmatched.append([text if twin == UNMATCHED else None for text, twin in texts])
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
        """Pair the candidates of each group, in descending order of probability, with their counterparts.

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


def spellings(tokens: Tokens, size: int) -> list[str | None]:
    """Return the text of each token without its spaces; None for special tokens and for padding of the head."""
    texts = [None if token is None else token_text(token).replace(" ", "") for token in tokens]
    return texts + [None] * (size - len(texts))


def group_ids(sizes: Int[Tensor, " groups"]) -> Int[Tensor, " rows"]:
    """Return the group of each position, for groups of consecutive positions with these sizes."""
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)


def mean_columns(columns: Columns, sizes: Int[Tensor, " groups"]) -> Float[Tensor, "vocab groups"]:
    """Compute the mean over each group for all tokens."""
    means, several = columns[:, sizes.cumsum(0) - sizes], sizes > 1
    shares = (group_ids(sizes)[:, None] == several.nonzero().squeeze(1)) / sizes[several].to(columns.dtype)
    means[:, several] = columns @ shares
    return means


def means_at(columns: Columns, sizes: Int[Tensor, " groups"], ids: Ids) -> Float[Tensor, "groups _"]:
    """Compute the mean over each group for some tokens of each group; differentiable."""
    groups = group_ids(sizes)
    values = columns.gather(0, ids[groups].t()).t()
    return values.new_zeros(ids.shape).index_add(0, groups, values) / sizes[:, None]


def warp(
    entropies: Sequence[Float[Tensor, " _"]], texts: Sequence[Sequence[str]], lengths: Sequence[Int[Tensor, " batch"]]
) -> tuple[list[Int[Tensor, " groups"]], Float[Tensor, " groups"]]:
    """Align the positions of both sides by dynamic time warping and cut them into groups.

    Args:
        entropies: entropy at each position of both sides, in nats.
        texts: text of the token read at each position of both sides.
        lengths: tokens per example of both sides, at least 1, on the CPU.

    Returns:
        The number of positions of each group, of the student and of the teacher, and the weight of each group. The weights of
        an example are equal and sum to its student tokens.
    """
    from dwakd.align.edit_distance import edit_costs, warped_runs

    device = entropies[0].device
    sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
    shares = []
    factors = [
        torch.split(warping_weights(side.cpu(), n), n.tolist()) for side, n in zip(entropies, lengths, strict=True)
    ]
    starts = [(n.cumsum(0) - n).tolist() for n in lengths]
    for f_s, s, f_t, t in zip(factors[0], starts[0], factors[1], starts[1], strict=True):
        distances = edit_costs(texts[0][s : s + len(f_s)], texts[1][t : t + len(f_t)])
        runs = warped_runs(distances * f_s.numpy()[:, None] * f_t.numpy())
        for side, run in zip(sizes, runs, strict=True):
            side.append(torch.from_numpy(run).long())
        shares.append(torch.full((len(runs[0]),), len(f_s) / len(runs[0]), dtype=entropies[0].dtype))
    return [torch.cat(side).to(device) for side in sizes], torch.cat(shares).to(device)


def warping_weights(entropy: Float[Tensor, " rows"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, " rows"]:
    """Compute the cost factor f = floor(3 sigmoid(4e - 2) + 3) of each position.

    e is the entropy, scaled to 0 to 1 within an example; 0 if all entropies of the example are equal up to rounding.
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

    Only the blocks of the vocabulary with the largest maxima are searched, because these contain the tokens.
    """
    whole = len(columns) // BLOCK
    if count >= whole:
        return columns.t().topk(min(count, len(columns))).indices
    maxima = columns[: whole * BLOCK].view(whole, BLOCK, -1).amax(1)
    tokens = torch.arange(len(columns), device=columns.device)
    inside = maxima.t().topk(count).indices[:, :, None] * BLOCK + tokens[:BLOCK]
    ids = torch.cat([inside.flatten(1), tokens[whole * BLOCK :].expand(columns.shape[1], -1)], 1)
    return ids.gather(1, columns.gather(0, ids.t()).t().topk(count).indices)
