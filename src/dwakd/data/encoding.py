"""One tokenizer's view of a text: token ids, and where each token ends in the text's bytes."""

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
    """Tokenises prompts and responses, each apart from the other.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed).
        template: how a row becomes a prompt; see `dwakd.data.prompts`.
        bos: `auto` puts in front of a prompt the tokens which the tokenizer puts in front of any text by itself
            (Llama's `<s>`; nothing for GPT-2 and Qwen); `never` puts nothing there, the paper's way. The chat
            template renders its own beginning, to which nothing is ever added.
        special_tokens_in_prompts: `parse` makes a special token of every "</s>" that a row's prompt spells out, as
            tokenizers do by default; `text` reads it as text, unless the template wrote it.
        date: ISO date that a chat template prints as today's; the current date by default.

    Raises:
        UserError: a slow tokenizer, an unknown option, or no end-of-sequence token.
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
                f"the tokenizer of {tokenizer_name(tokenizer)} is a slow one without offsets: "
                "convert it to a tokenizer.json"
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

    @property
    def special_tokens_in_prompts(self) -> str:
        """The option of that name."""
        return "parse" if self._special_as_text is None else "text"

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
        as_text = self._special_as_text
        if as_text is None:
            encoded = _encode(self.tokenizer, map(self.prompt_text, examples), special=True)["input_ids"]
        else:
            encoded = _encode(as_text.tokenizer, map(as_text.render, examples), special=False)["input_ids"]
            encoded = map(as_text.restore, encoded, examples)
        return [[*self._bos_ids, *ids] for ids in encoded]

    def response_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a response without an end token, and the offset at which each token ends.

        Special tokens that are spelled out in the text are taken for text: "</s>" in an answer ends nothing. (A
        Unigram vocabulary that lists it among its pieces finds it all the same.)

        Args:
            text: the response; the empty text has no tokens.

        Returns:
            The ids, and per id its end in the UTF-8 bytes of `text`. The last end is the length of the text in bytes,
            and the ends never fall, apart from the negative numbers explained below. A token that ends inside a
            character has its end there, exactly, for byte-level BPE and byte fallback. Marks that a tokenizer
            composes or drops belong to the token before them, white space and other characters that it drops to the
            token after them, and everything at the end to the last. A token that ends inside text which
            normalisation changed ends at no byte of the text: in place of an end it has a negative number. Two
            tokenizers have the same number there only if they changed the same text to the same bytes and both cut
            these at this place.
        """
        return self.response_ids_batch([text])[0]

    def response_ids_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """`response_ids` of several texts at once."""
        backend = self.tokenizer.backend_tokenizer
        processor = backend.post_processor
        backend.post_processor = None  # RoBERTa's takes white space off the offsets
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
    """What the tokenizer puts in front of any text by itself, found by its post-processor alone."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return []
    unused = 2**32 - 1  # no vocabulary has so many tokens
    text = Tokenizer(WordLevel({"text": unused}, unk_token="text")).encode("text")
    ids: list[int] = processor.process(text).ids
    return ids[: ids.index(unused)]
