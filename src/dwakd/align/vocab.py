"""Match the tokens of two vocabularies that spell the same bytes or have the most similar spelling."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from dwakd.folders import cache_folder

Tokens = Sequence[bytes | None]
Ids = npt.NDArray[np.int64]

_FORMAT = b"dwakd nearest tokens 1"
_PAIRS_WORTH_KEEPING = 10**7
_CHUNK = 512


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
        teacher_tokens: bytes of each teacher token by id; None for special tokens.
        end_tokens: end-of-sequence ids (student, teacher), which are paired with each other.

    Returns:
        The student ids in ascending order, and the teacher id of each pair.
    """
    if tuple(student_tokens) == tuple(teacher_tokens):
        return torch.arange(len(student_tokens)), torch.arange(len(teacher_tokens))
    mine, theirs = _by_spelling(student_tokens), _by_spelling(teacher_tokens)
    if end_tokens is not None:
        for side, tokens, end in ((mine, student_tokens, end_tokens[0]), (theirs, teacher_tokens, end_tokens[1])):
            spelling = tokens[end]
            if spelling is not None:  # the end token is paired as such, not by its spelling
                side[spelling].remove(end)
            side[None] = [end]
    pairs = [
        pair
        for spelling, ids in mine.items()
        for pair in zip(reversed(ids), reversed(theirs.get(spelling, [])), strict=False)
    ]
    student_ids, teacher_ids = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).unbind(1)
    return student_ids, teacher_ids


def nearest_tokens(
    source_tokens: Tokens, target_tokens: Tokens, end_tokens: tuple[int, int] | None = None
) -> Int[Tensor, " source"]:
    """Find, for each source token, the target token with the least Levenshtein distance.

    Tokens with the same bytes are mapped as in `exact_overlap`. The others are compared by characters; a byte that is
    not part of a complete character is compared as a character of its own. The first of several nearest tokens is
    taken. If both vocabularies are equal, every token is mapped to itself. For large vocabularies the computation
    takes up to a minute and shows a progress bar; its result is stored under `$DWAKD_CACHE`.

    Args:
        source_tokens: bytes of each source token by id; None for special tokens.
        target_tokens: bytes of each target token by id; None for special tokens. At least one must not be special.
        end_tokens: end-of-sequence ids (source, target), which are mapped to each other.

    Returns:
        The target id for each source token, or -1 for special tokens.
    """
    if tuple(source_tokens) == tuple(target_tokens):
        return torch.arange(len(source_tokens))
    size = len(source_tokens) * len(target_tokens)
    path = None if size < _PAIRS_WORTH_KEEPING else _cache_path(source_tokens, target_tokens)
    if path is not None and path.is_file():
        found = load_file(path)["nearest"]
    else:
        found = _nearest_ids(source_tokens, target_tokens)
        if path is not None:
            _write_atomically(path, found)
    result = torch.from_numpy(found)
    if end_tokens is not None:
        result[end_tokens[0]] = end_tokens[1]
    return result


def token_text(token: bytes) -> str:
    """Decode a token. Each byte that is not part of a complete character becomes a surrogate code point."""
    return token.decode("utf-8", "surrogateescape")


def _by_spelling(tokens: Tokens) -> dict[bytes | None, list[int]]:
    ids: dict[bytes | None, list[int]] = defaultdict(list)
    for index, token in enumerate(tokens):
        if token is not None:
            ids[token].append(index)
    return ids


def _nearest_ids(source_tokens: Tokens, target_tokens: Tokens) -> Ids:
    ids = np.full(len(source_tokens), -1, np.int64)
    for target, source in zip(*(side.tolist() for side in exact_overlap(target_tokens, source_tokens)), strict=True):
        ids[source] = target
    spelled = {spelling: index for spelling, (*_, index) in _by_spelling(target_tokens).items()}
    texts: dict[str, list[int]] = defaultdict(list)
    for source, token in enumerate(source_tokens):
        if token is not None and ids[source] < 0:
            if token in spelled:
                ids[source] = spelled[token]
            else:
                texts[token_text(token)].append(source)
    targets = [index for index, token in enumerate(target_tokens) if token is not None]
    chosen = _nearest_texts(list(texts), [token_text(target_tokens[index] or b"") for index in targets])
    for target, sources in zip(chosen.tolist(), texts.values(), strict=True):
        ids[sources] = targets[target]
    return ids


def _nearest_texts(queries: list[str], texts: list[str]) -> Ids:
    """Find the index of the first text of least distance for each query. No query may equal a text."""
    from dwakd.align import nearest as compiled  # imported late, because numba takes half a second to load

    chosen = np.zeros(len(queries), np.int64)
    long = [index for index, query in enumerate(queries) if not 0 < len(query) <= compiled.WORD]
    if long:
        chosen[long] = cdist([queries[index] for index in long], texts, scorer=Levenshtein.distance).argmin(1)
    short = [index for index, query in enumerate(queries) if 0 < len(query) <= compiled.WORD]
    if not short:
        return chosen
    (query_codes, query_bounds), (text_codes, text_bounds) = (
        compiled.codes(strings) for strings in ([queries[index] for index in short], texts)
    )
    query_codes, text_codes = compiled.rank_codes(query_codes, text_codes)
    num_codes = int(max(query_codes.max(), text_codes.max(initial=0))) + 1
    arguments = (
        query_codes, query_bounds, compiled.bags(query_codes, query_bounds),
        text_codes, text_bounds, compiled.bags(text_codes, text_bounds), num_codes,
    )  # fmt: skip
    out = np.zeros(len(short), np.int64)
    firsts = range(0, len(short), _CHUNK)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(short), desc="matching vocabularies", unit="token", delay=2, leave=False) as progress,
    ):
        for _ in pool.map(
            lambda first: compiled.nearest(*arguments, first, min(first + _CHUNK, len(short)), out), firsts
        ):
            progress.update(_CHUNK)
    chosen[short] = out
    return chosen


def _cache_path(source_tokens: Tokens, target_tokens: Tokens) -> Path:
    digest = hashlib.sha256(_FORMAT)
    for tokens in (source_tokens, target_tokens):
        digest.update(len(tokens).to_bytes(8, "big"))
        for token in tokens:
            digest.update(b"\xff" if token is None else len(token).to_bytes(4, "big") + token)
    return cache_folder() / "vocabularies" / f"{digest.hexdigest()[:32]}.safetensors"


def _write_atomically(path: Path, ids: Ids) -> None:
    """Write the file atomically, so that several processes can write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        save_file({"nearest": ids}, file.name)
    Path(file.name).replace(path)
