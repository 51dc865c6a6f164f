"""Shorten extremely long texts before they are tokenised, where this cannot change the first tokens."""

import re
from collections.abc import Callable
from typing import Any

_CHARACTERS_PER_TOKEN = 16
_WORD_END = re.compile(r"[^\W\d_](?= [^\W\d_]+ )")
"""A letter before a space and a word of letters: normalisers combine nothing here, and pre-tokenizers look no further."""


def leading_text(text: str, limit: int, encode: Callable[[str], Any], *, words_apart: bool) -> str:
    """Return the start of a text whose tokens are the first tokens of the whole text, and more than `limit`.

    A text is cut only between two words that the tokenizer reads independently: the pre-tokenizer separates them, or no
    token spells a space after another character (Llama 2, T5). The whole text is returned if there is no such place, as in
    scripts without spaces. There, the first tokens may depend on the end of the text.

    Args:
        text: the text.
        limit: number of tokens that the caller reads.
        encode: returns the `tokenizers.Encoding` of a text.
        words_apart: whether no token spells a space after another character.
    """
    size = _CHARACTERS_PER_TOKEN * (limit + 1)
    while 2 * size < len(text):
        ends = [found.end() for found in _WORD_END.finditer(text[:size])][-8:]
        encoding = encode(text[:size]) if ends else None
        size *= 4
        if encoding is None:
            continue
        words, starts = encoding.word_ids, {start: place for place, (start, _) in enumerate(encoding.offsets)}
        if words[-1] == words[0] and not words_apart:
            return text
        for end in reversed(ends):
            place = starts.get(end, starts.get(end + 1, 0))  # the next token begins with the space or after it
            if place > limit and (words_apart or words[place] != words[place - 1]):
                return text[:end]
    return text
