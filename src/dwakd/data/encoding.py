"""Encode prompts and responses with one tokenizer, and compute where each token ends in the bytes of the response."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dwakd.data import special_tokens
from dwakd.data.chat import tokenizer_name
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.data.token_bytes import TokenBytes, byte_ends
from dwakd.errors import UserError

BOS_CHOICES = ("auto", "never")


class TextEncoder:
    """Tokenise prompts and responses separately.

    Args:
        tokenizer: a fast tokenizer of transformers, because offsets are needed.
        template: the template that renders a row as a prompt; see `dwakd.data.prompts`.
        bos: `auto` puts the tokens that the tokenizer adds before any text (`<s>` for Llama, nothing for GPT-2 and
            Qwen) before each prompt; `never` adds none, as in the paper's code. Nothing is added to prompts of the
            `chat` template, which writes its own beginning.
        special_tokens_in_prompts: `parse` reads special tokens such as "</s>" that a row spells out as special tokens,
            as tokenizers do by default; `text` reads them as text, unless the template wrote them.
        date: ISO date that a chat template prints as today's date. Default: the current date.

    Raises:
        UserError: the tokenizer is a slow one or has no end-of-sequence token, or an option has an unknown value.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "alpaca",
        bos: str = "auto",
        special_tokens_in_prompts: str = "parse",
        *,
        date: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer of {tokenizer_name(tokenizer)} is a slow tokenizer without offsets: "
                "convert it to a fast tokenizer (tokenizer.json)"
            )
        if bos not in BOS_CHOICES:
            raise UserError(f"data.bos {bos!r} is unknown: use {' or '.join(BOS_CHOICES)}")
        if special_tokens_in_prompts not in special_tokens.CHOICES:
            raise UserError(
                f"data.special_tokens_in_prompts {special_tokens_in_prompts!r} is unknown: "
                f"use {' or '.join(special_tokens.CHOICES)}"
            )
        self.tokenizer = tokenizer
        self.template = template
        self._prompts = Prompts(template, tokenizer, date)
        self.end_token_id = self._prompts.end_token_id()
        self._bos_ids = _leading_ids(tokenizer) if bos == "auto" and template != "chat" else []
        self._piece_bytes = TokenBytes(tokenizer)
        as_text = special_tokens_in_prompts == "text"
        self._special_as_text = special_tokens.SpecialTokensAsText(self._prompts) if as_text else None

    @property
    def date(self) -> str | None:
        """The date that a chat template prints as today's date; None for other templates."""
        return None if self._prompts.chat is None else self._prompts.chat.date

    @property
    def printed_date(self) -> str | None:
        """The value of `date` if the chat template prints it, else None."""
        return self.date if self._prompts.chat is not None and self._prompts.chat.prints_date else None

    @property
    def end_token_ids(self) -> list[int]:
        """All ids that stop generation: the supervised end token, then the end-of-sequence token if it differs."""
        eos = self.tokenizer.eos_token_id
        return [self.end_token_id] if eos in (None, self.end_token_id) else [self.end_token_id, int(eos)]

    @property
    def special_tokens_in_prompts(self) -> str:
        """The value of the option `special_tokens_in_prompts`: `parse` or `text`."""
        return "parse" if self._special_as_text is None else "text"

    def token_bytes(self) -> tuple[bytes | None, ...]:
        """Return the bytes that each token of the vocabulary spells, by id; None for special and unused tokens.

        The space markers of SentencePiece and of byte-level BPE both become the byte of a space.
        """
        special = set(self.tokenizer.all_special_ids)
        known = set(self.tokenizer.get_vocab().values())
        return tuple(
            self._piece_bytes[index] if index in known and index not in special else None
            for index in range(max(known) + 1)
        )

    def prompt_text(self, example: Example) -> str:
        """Render the text that the model reads before its answer."""
        return self._prompts.render(example)

    def prompt_ids(self, example: Example) -> list[int]:
        """Encode the prompt of a row, with the beginning-of-sequence tokens that the option `bos` adds."""
        return self.prompt_ids_batch([example])[0]

    def prompt_ids_batch(self, examples: Sequence[Example]) -> list[list[int]]:
        """Compute `prompt_ids` of several rows at once."""
        as_text = self._special_as_text
        if as_text is None:
            encoded = _encode(self.tokenizer, map(self.prompt_text, examples), special=True)["input_ids"]
        else:
            encoded = _encode(as_text.tokenizer, map(as_text.render, examples), special=False)["input_ids"]
            encoded = map(as_text.restore, encoded, examples)
        return [[*self._bos_ids, *ids] for ids in encoded]

    def response_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Encode a response without an end token, and compute the offset at which each token ends.

        Special tokens that the text spells out are read as text, so that "</s>" in an answer does not end it. (Unigram
        tokenizers that list "</s>" among their pieces still read it as a special token.)

        Args:
            text: the response; the empty text has no tokens.

        Returns:
            The ids, and the end of each token in the UTF-8 bytes of `text`. The last end is the length of the text in
            bytes, and ends never decrease, except for the negative numbers described below. With byte-level BPE and
            byte fallback, the end of a token inside a character is exact. Combining marks that a tokenizer composes or
            drops belong to the token before them. White space and other characters that it drops belong to the token
            after them, or to the last token. A token that ends inside text that normalisation changed has no offset and
            gets a negative number instead. Two tokenizers get the same number only if they changed the same text to
            the same bytes and both split these at the same place.
        """
        return self.response_ids_batch([text])[0]

    def response_ids_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Compute `response_ids` of several texts at once."""
        backend = self.tokenizer.backend_tokenizer
        processor = backend.post_processor
        backend.post_processor = None  # RoBERTa's removes white space from the offsets
        try:
            encoded = _encode(self.tokenizer, texts, special=False)
        finally:
            backend.post_processor = processor
        return [
            (ids, byte_ends(text, [self._piece_bytes[token_id] for token_id in ids], encoding.offsets))
            for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True)
        ]


def _encode(tokenizer: Any, texts: Iterable[str], *, special: bool) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=not special,
        verbose=False,
    )


def _leading_ids(tokenizer: Any) -> list[int]:
    """Find the tokens that the tokenizer's post-processor puts before any text."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return []
    unused = 2**32 - 1  # larger than any vocabulary
    text = Tokenizer(WordLevel({"text": unused}, unk_token="text")).encode("text")
    ids: list[int] = processor.process(text).ids
    return ids[: ids.index(unused)]
