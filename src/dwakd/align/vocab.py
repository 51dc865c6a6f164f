"""Match the tokens of two vocabularies that spell the same bytes or have the most similar spelling."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import trange

from dwakd.checksums import code_digest
from dwakd.folders import cache_folder, write_file

Tokens = Sequence[bytes | None]
Ids = NDArray[np.int64]

NONE = -1
"""Id of a token without a match."""
_PAIRS_WORTH_KEEPING = 10**7
_CHUNK = 256


def exact_overlap(
    student_tokens: Tokens, teacher_tokens: Tokens, end_tokens: tuple[int, int] | None = None
) -> tuple[Int[Tensor, " overlap"], Int[Tensor, " overlap"]]:
    """Find the pairs of a student token and a teacher token that spell the same bytes.

    The pairs are one-to-one. If several tokens of a vocabulary spell the same bytes, the last is paired with the last,
    the one before with the one before, and so on (in SentencePiece vocabularies the byte pieces come before the
    characters). Special tokens stay unmatched, except the end tokens. If both vocabularies are equal, every token is
    paired with itself.

    Args:
        student_tokens: bytes of each student token by id; None for special tokens.
        teacher_tokens: the same for the teacher.
        end_tokens: end-of-sequence ids (student, teacher), which are paired with each other.

    Returns:
        The student ids in ascending order, and the teacher id of each pair.
    """
    if tuple(student_tokens) == tuple(teacher_tokens):
        return torch.arange(len(student_tokens)), torch.arange(len(teacher_tokens))
    sides = []
    for tokens, end in zip((student_tokens, teacher_tokens), end_tokens or (None, None), strict=True):
        ids: dict[bytes | None, list[int]] = defaultdict(list)
        for index, token in enumerate(tokens):
            if index == end:  # paired as the end token, not by its spelling
                ids[None].append(index)
            elif token is not None:
                ids[token].append(index)
        sides.append(ids)
    pairs = [
        pair
        for spelling, ids in sides[0].items()
        for pair in zip(reversed(ids), reversed(sides[1].get(spelling, [])), strict=False)
    ]
    student_ids, teacher_ids = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).unbind(1)
    return student_ids, teacher_ids


def nearest_tokens(
    source_tokens: Tokens, target_tokens: Tokens, end_tokens: tuple[int, int] | None = None
) -> Int[Tensor, " source"]:
    """Find, for each source token, the target token with the least Levenshtein distance.

    Tokens with the same bytes are mapped as in `exact_overlap`. The others are compared by characters; a byte that is
    not part of a complete character is compared as one character. The first of several nearest tokens is
    taken. If both vocabularies are equal, every token is mapped to itself. For large vocabularies the computation
    takes up to a minute and shows a progress bar; its result is stored under `$DWAKD_CACHE`.

    Args:
        source_tokens: bytes of each source token by id; None for special tokens.
        target_tokens: the same for the target. At least one token must not be special.
        end_tokens: end-of-sequence ids (source, target), which are mapped to each other.

    Returns:
        The target id for each source token, or `NONE` for special tokens.
    """
    source_tokens, target_tokens = tuple(source_tokens), tuple(target_tokens)
    if source_tokens == target_tokens:
        return torch.arange(len(source_tokens))
    tokens = source_tokens, target_tokens
    ids = stored(lambda: {"nearest": torch.from_numpy(_nearest_ids(*tokens))}, *tokens)["nearest"]
    if end_tokens is not None:
        ids[end_tokens[0]] = end_tokens[1]
    return ids


def stored(
    build: Callable[[], dict[str, Tensor]], source_tokens: Tokens, target_tokens: Tokens, *more: object
) -> dict[str, Tensor]:
    """Return what `build` computes for two vocabularies and `more`. If they are large, it is stored under `$DWAKD_CACHE`."""
    if len(source_tokens) * len(target_tokens) < _PAIRS_WORTH_KEEPING:
        return build()
    digest = hashlib.sha256(repr((code_digest(), source_tokens, target_tokens, *more)).encode()).hexdigest()[:32]
    path = cache_folder() / "vocabularies" / f"{digest}.safetensors"
    if not path.is_file():
        write_file(path, save(build()))  # other processes may write it as well
    return load_file(path)


def token_text(token: bytes) -> str:
    """Decode a token. Each byte that is not part of a complete character becomes a surrogate code point."""
    return token.decode("utf-8", "surrogateescape")


def _nearest_ids(source_tokens: Tokens, target_tokens: Tokens) -> Ids:
    unknown = -2
    target_of: dict[bytes | None, int] = {token: index for index, token in enumerate(target_tokens)} | {None: NONE}
    ids = np.array([target_of.get(token, unknown) for token in source_tokens], np.int64)
    matched, counterparts = exact_overlap(source_tokens, target_tokens)
    ids[matched.numpy()] = counterparts.numpy()
    sources = np.flatnonzero(ids == unknown)
    targets = np.array([index for index, token in enumerate(target_tokens) if token is not None])
    texts = [token_text(target_tokens[index] or b"") for index in targets]
    for first in trange(0, len(sources), _CHUNK, desc="matching vocabularies", delay=2, leave=False):
        chunk = sources[first : first + _CHUNK]
        queries = [token_text(source_tokens[index] or b"") for index in chunk]
        distances = cdist(queries, texts, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        ids[chunk] = targets[distances.argmin(1)]
    return ids


class CandidateMatcher:
    """Find, for each candidate token of one model, the nearest candidate of the other model at the same position.

    The normalised distance is the edit distance divided by the sum of both lengths.

    Args:
        student_texts: text of each student token by id; None for tokens that must stay unmatched.
        teacher_texts: text of each teacher token by id, in the same form.
        threshold: tokens are matched only if their normalised distance is below this number.
    """

    def __init__(
        self, student_texts: Sequence[str | None], teacher_texts: Sequence[str | None], threshold: float
    ) -> None:
        self.is_open = [np.array([text is not None for text in texts]) for texts in (student_texts, teacher_texts)]
        self.texts = [np.array([text or "" for text in texts], object) for texts in (student_texts, teacher_texts)]
        self.lengths = [np.array([len(text) for text in texts]) for texts in self.texts]
        self.threshold = threshold

    def __call__(self, student: Ids, teacher: Ids) -> tuple[Ids, Ids]:
        """Match the candidates at each position. The first of several equally near candidates is taken.

        Args:
            student: token ids of the student's candidates, (positions, candidates).
            teacher: token ids of the teacher's candidates, (positions, candidates).

        Returns:
            The student token for each candidate of the teacher, and the teacher token for each candidate of the
            student; `NONE` for a candidate without a match.
        """
        student_for, teacher_for = np.full_like(teacher, NONE), np.full_like(student, NONE)
        s_open, t_open = self.is_open[0][student], self.is_open[1][teacher]
        for place in np.flatnonzero(s_open.any(1) & t_open.any(1)):
            s_ids, t_ids = student[place, s_open[place]], teacher[place, t_open[place]]
            s_texts, t_texts = self.texts[0][s_ids].tolist(), self.texts[1][t_ids].tolist()
            distances = cdist(s_texts, t_texts, scorer=Levenshtein.distance, dtype=np.uint16)
            ratios = distances / (self.lengths[0][s_ids][:, None] + self.lengths[1][t_ids]).clip(1)
            is_near = ratios < self.threshold
            student_for[place, t_open[place]] = np.where(is_near.any(0), s_ids[ratios.argmin(0)], NONE)
            teacher_for[place, s_open[place]] = np.where(is_near.any(1), t_ids[ratios.argmin(1)], NONE)
        return student_for, teacher_for
