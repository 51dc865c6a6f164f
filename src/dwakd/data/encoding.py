"""One tokenizer's view of a text: token ids, and where each token ends in the text's bytes."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from dwakd.data.chat import tokenizer_name
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.errors import UserError

BOS_CHOICES = ("auto", "never")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextEncoder:
    """Tokenises prompts and responses, each apart from the other.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed).
        template: how a row becomes a prompt; see `dwakd.data.prompts`.
        bos: `auto` puts in front of a prompt the tokens which the tokenizer puts in front of any text by itself
            (Llama's `<s>`; nothing for GPT-2 and Qwen); `never` puts nothing there, the paper's way. The chat
            template renders its own beginning, to which nothing is ever added.
        date: ISO date that a chat template prints as today's; the current date by default.

    Raises:
        UserError: a slow tokenizer, an unknown template or bos, or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, template: str = "alpaca", bos: str = "auto", date: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer of {tokenizer_name(tokenizer)} is a slow one without offsets: "
                "convert it to a tokenizer.json"
            )
        if bos not in BOS_CHOICES:
            raise UserError(f"data.bos {bos!r} is unknown: use {' or '.join(BOS_CHOICES)}")
        self.tokenizer = tokenizer
        self.template = template
        self._prompts = Prompts(template, tokenizer, date)
        self.end_token_id = self._prompts.end_token_id()
        self._bos_ids = _leading_ids(tokenizer) if bos == "auto" and template != "chat" else []
        self._piece_bytes = _PieceBytes(tokenizer)

    @property
    def date(self) -> str | None:
        """The date that a chat template prints as today's; None for other templates."""
        return None if self._prompts.chat is None else self._prompts.chat.date

    @property
    def printed_date(self) -> str | None:
        """`date` if the chat template prints it."""
        return self.date if self._prompts.chat is not None and self._prompts.chat.prints_date else None

    @property
    def end_token_ids(self) -> list[int]:
        """Every id that should stop generation: the supervised end token first, then end-of-sequence."""
        eos = self.tokenizer.eos_token_id
        return [self.end_token_id] if eos in (None, self.end_token_id) else [self.end_token_id, int(eos)]

    def token_bytes(self) -> tuple[bytes | None, ...]:
        """The bytes of text that each token of the vocabulary stands for, by id; None for special and unused ones.

        The space of SentencePiece and that of byte-level BPE are the same byte here.
        """
        special = set(self.tokenizer.all_special_ids)
        known = set(self.tokenizer.get_vocab().values())
        return tuple(
            self._piece_bytes[index] if index in known and index not in special else None
            for index in range(max(known) + 1)
        )

    def prompt_text(self, example: Example) -> str:
        """The text that the model reads before its answer."""
        return self._prompts.render(example)

    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt, with the model's own beginning-of-sequence tokens."""
        return self.prompt_ids_batch([example])[0]

    def prompt_ids_batch(self, examples: Sequence[Example]) -> list[list[int]]:
        """`prompt_ids` of several rows at once."""
        texts = [self.prompt_text(example) for example in examples]
        return [[*self._bos_ids, *ids] for ids in self._encode(texts, special=True)["input_ids"]]

    def response_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a response without an end token, and the offset at which each token ends.

        Special tokens that are spelled out in the text are taken for text: "</s>" in an answer ends nothing. (A
        Unigram vocabulary that lists it among its pieces finds it all the same.)

        Args:
            text: the response; the empty text has no tokens.

        Returns:
            The ids, and per id its end in the UTF-8 bytes of `text`. The ends never fall and the last is the length
            of the text in bytes. A token that ends inside a character has its end there, exactly, for byte-level
            BPE and byte fallback. White space that a tokenizer drops counts to the token after it, other
            characters to the token before them, and everything at the end to the last. Where normalisation split
            one character into several tokens, their inner ends lie inside that character, with no meaning beyond
            their order.
        """
        return self.response_ids_batch([text])[0]

    def response_ids_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """`response_ids` of several texts at once."""
        encoded = self._encode(texts, special=False)
        return [
            (ids, self._byte_ends(text, ids, encoding))
            for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True)
        ]

    def _encode(self, texts: Sequence[str], *, special: bool) -> Any:
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=not special,
            verbose=False,
        )

    def _byte_ends(self, text: str, ids: list[int], encoding: Any) -> list[int]:
        pieces = [self._piece_bytes[token_id] for token_id in ids]
        ends = list(accumulate(map(len, pieces)))
        spelled, data = b"".join(pieces), text.encode()
        if spelled == data:
            return ends
        if spelled == b" " + data:  # the dummy prefix of SentencePiece is no part of the text
            return [end - 1 for end in ends]
        return _ends_from_offsets(text, pieces, encoding.offsets)


def _ends_from_offsets(text: str, pieces: list[bytes], offsets: list[tuple[int, int]]) -> list[int]:
    """Byte ends from character offsets, for tokens that do not spell the text (normalised, unknown, dropped)."""
    if not pieces:
        return []
    at = [0, *accumulate(len(character.encode()) for character in text)]
    ends = [at[-1]] * len(pieces)
    for k in range(len(pieces) - 2, -1, -1):
        next_start, end = offsets[k + 1][0], offsets[k][1]
        if next_start < end:  # both tokens lie in one character: the later one's bytes are taken off its end
            ends[k] = max(ends[k + 1] - len(pieces[k + 1]), at[next_start])
        else:  # between the two, marks that normalisation composed or dropped belong to the earlier token
            ends[k] = at[next((n for n in range(end, next_start) if text[n].isspace()), next_start)]
        ends[k] = min(ends[k], ends[k + 1])
    return ends


class _PieceBytes(dict[int, bytes]):
    """The bytes that a token stands for, by id, worked out when first asked for."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        state = tokenizer.backend_tokenizer
        parts = f"{state.pre_tokenizer!r} {state.decoder!r}"
        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in parts else None
        self._byte_fallback = "ByteFallback" in parts
        self._word_prefix = "##" if "WordPiece" in repr(state.model) else ""

    def __missing__(self, token_id: int) -> bytes:
        value = self._spell(token_id)
        self[token_id] = value
        return value

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return bytes(self._added[token_id].encode())
        piece: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._byte_of is not None:
            spelled = [self._byte_of.get(character) for character in piece]
            return piece.encode() if None in spelled else bytes(b for b in spelled if b is not None)
        if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if self._word_prefix:
            return piece.removeprefix(self._word_prefix).encode()
        return piece.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of any text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    raise AssertionError("a tokenizer's special tokens changed the tokens of the text itself")
