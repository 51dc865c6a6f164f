"""Map each token of one vocabulary to a few tokens of another one: the projection matrix of X-Token (arXiv 2605.21699)."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dwakd.align.vocab import Tokens

MOST_PIECES = 4
_DECAY = 0.1


Spell = Callable[[Sequence[bytes]], list[list[int]]]
Entries = dict[int, dict[int, float]]


def projection(
    student_tokens: Tokens,
    teacher_tokens: Tokens,
    matched: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]],
    top_k: int,
    spell: tuple[Spell, Spell] | None = None,
) -> tuple[Int[Tensor, "s_vocab top_k"], Float[Tensor, "s_vocab top_k"]]:
    """Build the matrix W, whose row is a distribution over the teacher's tokens for each student token.

    A student token of `matched` is mapped to its counterpart only. Unmatched tokens are split into tokens of the other
    vocabulary, piece i of at most `MOST_PIECES` with a weight proportional to 0.1^i: W[s, piece] is increased by the weights
    for a student token s, and W[piece, t] for a teacher token t. Then the `top_k` largest entries of each row are kept and
    divided by their sum. Among equal weights, the lowest id is kept.

    Args:
        student_tokens: bytes of each student token by id; None for tokens that are mapped to nothing.
        teacher_tokens: the same for the teacher.
        matched: ids of the tokens that both vocabularies contain.
        top_k: most entries of a row.
        spell: functions (student, teacher) that split tokens as the tokenizer does; see `ModelPair`.

    Returns:
        The teacher tokens of each row in descending order of their weights, and the weights. Missing entries are token 0 with
        weight 0.
    """
    ids, weights = torch.zeros(len(student_tokens), top_k, dtype=torch.long), torch.zeros(len(student_tokens), top_k)
    ids[matched[0], 0], weights[matched[0], 0] = matched[1], 1.0
    own, theirs = (set(side.tolist()) for side in matched)
    by_student, by_teacher = spell or (None, None)
    rows: Entries = defaultdict(lambda: defaultdict(float))
    for student, pieces in split_all(student_tokens, teacher_tokens, own, by_teacher):
        for piece, weight in _weighted(pieces):
            rows[student][piece] += weight
    for teacher, pieces in split_all(teacher_tokens, student_tokens, theirs, by_student):
        for piece, weight in _weighted(pieces):
            rows[piece][teacher] += weight
    for student in rows.keys() - own:
        largest = sorted(rows[student].items(), key=lambda item: (-item[1], item[0]))[:top_k]
        total = sum(weight for _, weight in largest)
        for slot, (teacher, weight) in enumerate(largest):
            ids[student, slot], weights[student, slot] = teacher, weight / total
    return ids, weights


def split_all(
    source: Tokens, target: Tokens, matched: Set[int], spell: Spell | None
) -> Iterator[tuple[int, list[int]]]:
    """Split the unmatched tokens of a vocabulary into tokens of another one, by `spell` where possible, else by `split`."""
    vocabulary = {token: index for index, token in enumerate(target) if token}
    wanted = [(index, token) for index, token in enumerate(source) if token and index not in matched]
    spelled = spell([token for _, token in wanted]) if spell else [[] for _ in wanted]
    for (index, token), ids in zip(wanted, spelled, strict=True):
        allowed = ids and all(piece < len(target) and target[piece] for piece in ids)
        yield index, ids if allowed else split(token, vocabulary)


def split(token: bytes, vocabulary: Mapping[bytes, int]) -> list[int]:
    """Split a token into the longest tokens of a vocabulary, from left to right; empty if this is not possible.

    Examples:
        >>> split(b"201", {b"2": 5, b"0": 6, b"01": 7})
        [5, 7]
        >>> split(b"2010", {b"2": 5, b"0": 6, b"01": 7})
        [5, 7, 6]
        >>> split(b"21", {b"2": 5, b"0": 6, b"01": 7})
        []
    """
    pieces, start = [], 0
    while start < len(token):
        stop = next((end for end in range(len(token), start, -1) if token[start:end] in vocabulary), None)
        if stop is None:
            return []
        pieces.append(vocabulary[token[start:stop]])
        start = stop
    return pieces


def _weighted(pieces: list[int]) -> list[tuple[int, float]]:
    """Return the first pieces with weights that fall by a factor of ten and sum to 1."""
    weights = [_DECAY**index for index in range(len(pieces[:MOST_PIECES]))]
    return [(piece, weight / sum(weights)) for piece, weight in zip(pieces, weights, strict=False)]
