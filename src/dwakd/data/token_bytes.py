"""Compute the bytes that each token spells, and the offset at which each token ends in the bytes of a text."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """The bytes that each token of a fast tokenizer spells, by token id, computed on first access.

    The byte alphabet, byte pieces, space markers and affixes (`##`, `</w>`) are read from the tokenizer's components.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        backend = tokenizer.backend_tokenizer
        model = backend.model
        written, read = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)], [*_parts(backend.decoder)]
        kinds = {part["type"]: part for part in (*written, *read)}
        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        self._byte_of = (
            {written: byte for byte, written in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        )
        self._byte_fallback = getattr(model, "byte_fallback", False) or "ByteFallback" in kinds
        self._spaces = set(_space_marks(written, read))
        self._prefix = getattr(model, "continuing_subword_prefix", None) or kinds.get("WordPiece", {}).get("prefix", "")
        self._suffix = getattr(model, "end_of_word_suffix", None) or kinds.get("BPEDecoder", {}).get("suffix", "")

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = spelled = self._spell(token_id)
        return spelled

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return bytes(self._added[token_id].encode())
        piece: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._byte_of is None and self._byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        piece = piece.removeprefix(self._prefix) or piece
        piece = piece.removesuffix(self._suffix) or piece  # keep a token that consists of an affix only
        if self._byte_of is not None:
            spelled = [self._byte_of.get(character) for character in piece]
            return piece.encode() if None in spelled else bytes(b for b in spelled if b is not None)
        for mark in self._spaces:
            piece = piece.replace(mark, " ")
        return piece.encode()


def byte_ends(text: str, pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Compute the end of each token in the UTF-8 bytes of `text`; see `dwakd.data.encoding.TextEncoder.response_ids`.

    If the tokens spell the text, the ends follow from the lengths of the tokens. Otherwise the tokenizer's offsets
    divide text and tokens into the shortest parts that certainly correspond. Within a part, the ends of inner tokens
    are known only if the tokens of the part spell its text.

    `pieces` are the bytes that each token spells, `offsets` its first character and its end by the tokenizer.
    """
    whole = exact_ends(text, pieces)
    if whole is not None:
        return whole
    ends: list[int] = []
    start = 0
    for (token, character), (next_token, next_character) in pairwise(_cuts(text, pieces, offsets)):
        part, tokens = text[character:next_character], pieces[token:next_token]
        inner = exact_ends(part, tokens)
        ends += _marks(start, part, tokens) if inner is None else [start + end for end in inner]
        start += len(part.encode())
    return ends


def exact_ends(text: str, pieces: Sequence[bytes]) -> list[int] | None:
    """Compute the ends if the tokens spell the text, apart from dropped outer white space or one space put before it.

    The result is None if they do not.
    """
    if not pieces:
        return []
    spelled, data = b"".join(pieces), text.encode()
    if spelled == data:
        dropped = 0
    elif spelled == b" " + data:  # the dummy prefix of SentencePiece is not part of the text
        dropped = -1
    elif spelled == text.strip().encode():
        dropped = len(data) - len(text.lstrip().encode())
    else:
        return None
    return [*(dropped + end for end in accumulate(map(len, pieces[:-1]))), len(data)]


def _cuts(text: str, pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Find where tokens and text can both be cut, as pairs of a token index and a character index, ends included.

    Offsets are not reliable inside a character, nor between a character and combining marks, which normalisation may
    compose with it or reorder.
    """
    cuts = [(0, 0)]
    for token in range(1, len(pieces)):
        stop, start = offsets[token - 1][1], offsets[token][0]
        if token == 1 and start == 0 and pieces[0] == b" " and not text[0].isspace():
            cuts.append((1, 0))  # a dummy prefix before text that normalisation changed
        place = next((n for n in range(stop, min(start + 1, len(text))) if not _joins(text[n])), 0)
        if place > cuts[-1][1]:
            cuts.append((token, place))
    return [*cuts, (len(pieces), len(text))]


@cache
def _joins(character: str) -> bool:
    """Return whether normalisation may compose or swap a character with the one to its left (marks, later jamo)."""
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.category(first).startswith("M") or "\u1160" <= first <= "\u11ff"


def _marks(start: int, text: str, pieces: Sequence[bytes]) -> list[int]:
    """Compute the ends of the tokens of a part that normalisation changed. Only the end of the last token is known.

    Each inner token gets a negative number: a digest of the place of the part, its normalised bytes and the token's end.
    """
    spelled, stop = b"".join(pieces), start + len(text.encode())
    marks = [
        int.from_bytes(blake2b(b"%d %d %d " % (start, stop, place) + spelled, digest_size=4).digest(), "big")
        for place in accumulate(map(len, pieces[:-1]))
    ]
    return [*(-1 - (mark >> 1) for mark in marks), stop]


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of a normaliser, pre-tokenizer or decoder, or of each member of a sequence of them."""
    try:
        state = json.loads(component.__getstate__()) if component is not None else {}
    except Exception:  # components written in Python (RoFormer's pre-tokenizer) have no state
        return
    waiting = [state] if state else []
    for part in waiting:
        members = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
        if members:
            waiting += members
        else:
            yield part


def _space_marks(written: Iterable[dict[str, Any]], read: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the strings by which `written` (normaliser, pre-tokenizer) replace spaces, or which `read` (decoder) do."""
    for part in (*written, *read):
        if part["type"] == "Metaspace":
            yield part["replacement"]
    for part in written:
        if part["type"] == "Replace" and " " in part["pattern"].values() and part["content"]:
            yield part["content"]
    for part in read:
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]:
            yield part["pattern"]["String"]
