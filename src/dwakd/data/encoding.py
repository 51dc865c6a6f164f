"""Encode prompts and responses with one tokenizer, and compute where each token ends in the bytes of the response."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dwakd.data.chat import check_tokenizer, tokenizer_name
from dwakd.data.long_text import leading_text
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.data.special_tokens import SpecialTokensAsText, encode_texts
from dwakd.data.token_bytes import TokenBytes, byte_ends, exact_ends
from dwakd.data.turns import texts_to_show
from dwakd.errors import UserError
from dwakd.validation import check_choice


class TextEncoder:
    """Tokenise prompts and responses separately.

    Args:
        tokenizer: a fast tokenizer of transformers, because offsets are needed.
        template: the template that renders a row as a prompt; see `dwakd.data.prompts`.
        bos: `auto` puts the tokens that the tokenizer adds before any text (`<s>` for Llama, nothing for GPT-2 and
            Qwen) before each prompt, except for the `chat` template; `never` adds none, as in the paper's code.
        special_tokens_in_prompts: `parse` reads special tokens such as "</s>" that a row spells out as special tokens,
            as tokenizers do by default; `text` reads them as text, unless the template wrote them.
        date: ISO date that a chat template prints as today's date. Default: the current date.
        num_embeddings: number of embeddings of the model, if it is loaded. Prompts with later tokens are refused.

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
        num_embeddings: int | None = None,
    ) -> None:
        check_tokenizer(tokenizer, tokenizer_name(tokenizer))
        check_choice("data.bos", bos, ("auto", "never"))
        check_choice("data.special_tokens_in_prompts", special_tokens_in_prompts, ("parse", "text"))
        self.tokenizer = tokenizer
        self.template, self.bos = template, bos
        self.special_tokens_in_prompts = special_tokens_in_prompts
        self.num_embeddings = num_embeddings
        self._prompts = Prompts(template, tokenizer, date)
        chat = self._prompts.chat
        self.date = None if chat is None else chat.date
        """The date that a chat template prints as today's date; None for other templates."""
        self.printed_date = self.date if chat is not None and chat.prints_date else None
        """The value of `date` if the chat template prints it, else None."""
        self.end_token_id = self._prompts.end_token_id()
        self._bos_ids = _leading_ids(tokenizer) if bos == "auto" and template != "chat" else []
        self._token_bytes = TokenBytes(tokenizer)
        self._special_as_text = SpecialTokensAsText(self._prompts)

    @property
    def end_token_ids(self) -> list[int]:
        """All ids that stop generation: the supervised end token, then the end-of-sequence token if it differs."""
        return list(dict.fromkeys([self.end_token_id, int(self.tokenizer.eos_token_id)]))

    def token_bytes(self) -> tuple[bytes | None, ...]:
        """Return the bytes that each token of the vocabulary spells, by id; None for special and unused tokens.

        The space markers of SentencePiece and of byte-level BPE both become the byte of a space.
        """
        known = set(self.tokenizer.get_vocab().values())
        spelled = known - set(self.tokenizer.all_special_ids)
        return tuple(self._token_bytes[index] if index in spelled else None for index in range(max(known) + 1))

    def spell(self, tokens: Sequence[bytes]) -> list[list[int]]:
        """Encode each token of another vocabulary, and return no ids for one whose bytes the result does not spell exactly.

        Examples are parts of a character, and words without a space for tokenizers that put a space before any text.
        """
        found: list[list[int]] = [[] for _ in tokens]
        for start in ("", " "):
            missing = [i for i, ids in enumerate(found) if not ids and tokens[i].startswith(start.encode())]
            texts = [tokens[i].decode("utf-8", "replace").removeprefix(start) for i in missing]
            encoded = encode_texts(self.tokenizer, texts, split_special_tokens=True)["input_ids"] if texts else []
            for i, ids in zip(missing, encoded, strict=True):
                if b"".join(self._token_bytes[token_id] for token_id in ids) == tokens[i]:
                    found[i] = ids
        return found

    def prompt_text(self, example: Example) -> str:
        """Render the text that the model reads before its answer."""
        return self._prompts.render(example)

    def prompt_ids(self, example: Example) -> list[int]:
        """Encode the prompt of a row, with the beginning-of-sequence tokens that the option `bos` adds."""
        return self.prompt_ids_batch([example])[0]

    def prompt_ids_batch(self, examples: Sequence[Example]) -> list[list[int]]:
        """Compute `prompt_ids` of several rows at once.

        Raises:
            UserError: a prompt contains a special token for which the model has no embedding (see `num_embeddings`).
        """
        if self.special_tokens_in_prompts == "parse":
            encoded = encode_texts(self.tokenizer, map(self.prompt_text, examples), split_special_tokens=False)[
                "input_ids"
            ]
        else:
            encoded = self._special_as_text.encode(examples)
        if self.num_embeddings is not None:
            for ids, example in zip(encoded, examples, strict=True):
                self.check_embeddings(ids, self.num_embeddings, example.place)
        return [[*self._bos_ids, *ids] for ids in encoded]

    def check_embeddings(self, ids: Sequence[int], num_embeddings: int, place: str) -> None:
        """Raise a UserError that names `place` if the ids contain a token for which a model has no embedding."""
        if (last := max(ids, default=0)) >= num_embeddings:
            token, name = self.tokenizer.convert_ids_to_tokens(last), tokenizer_name(self.tokenizer)
            raise UserError(
                f"{place}: the prompt contains {token!r}, a special token of {name} for which the model has no embedding: "
                "remove it from that row or set data.special_tokens_in_prompts: text"
            )

    def with_response(self, example: Example) -> Example:
        """Return a row with the text that this model's template writes for an answer with tool calls or reasoning.

        Other rows are returned unchanged.

        Raises:
            UserError: the template cannot show the answer, or the answer contains the text of a special token, which could
                not be distinguished from the special tokens that the template writes.
        """
        if example.answer is None:
            return example
        self._check_plain(example)
        text = self._prompts.answer(example)
        return replace(example, response=text, references=(text,))

    def teacher_view(self, example: Example) -> Example:
        """Return a row with the prompt of a teacher, given the student's response (see `with_response`).

        The result keeps `answer` only if the template of the teacher writes the same text for it as the student's. It reads
        another text as the content of an answer.
        """
        own = example.for_teacher()
        if own.answer is None:
            return own
        self._check_plain(own)
        with suppress(UserError):
            if self._prompts.answer(own) == own.response:
                return own
        return replace(own, answer=None)

    def _check_plain(self, example: Example) -> None:
        texts = texts_to_show([example.answer or {}], {}, thoughts=True)
        for *_, key, text in texts:
            if found := self._special_as_text.find(text):
                raise UserError(
                    f"{example.place}: {key!r} of the answer spells out {found!r}, a special token of "
                    f"{tokenizer_name(self.tokenizer)}, which an answer with tool calls or reasoning must not contain: remove "
                    "it from that row"
                )

    def response_ids(self, text: str, *, special_tokens: bool = False) -> tuple[list[int], list[int]]:
        """Encode a response without an end token, and compute the offset at which each token ends.

        Special tokens that the text spells out are read as text, so that "</s>" in an answer does not end it. (Unigram
        tokenizers that list "</s>" among their pieces still read it as a special token.) With `special_tokens`, they are
        special tokens: those that a chat template writes in an answer.

        Returns:
            The ids, and the end of each token in the UTF-8 bytes of `text`. Ends never decrease, and the last one is
            the length of the text. Combining marks that a tokenizer composes or drops belong to the token before them;
            white space and other characters that it drops belong to the token after them, or to the last token. A token
            that ends inside text that normalisation changed has a negative number instead. Two tokenizers get the same
            number only if they changed the same text to the same bytes and both split these at the same place.
        """
        return self.response_ids_batch([text], special_tokens=special_tokens)[0]

    def response_ids_batch(
        self, texts: Sequence[str], *, special_tokens: bool = False, limit: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Compute `response_ids` of several texts at once; of texts with more than `limit` tokens, only the first tokens."""
        backend = self.tokenizer.backend_tokenizer
        processor = backend.post_processor
        backend.post_processor = None  # RoBERTa's removes white space from the offsets
        encode = partial(encode_texts, self.tokenizer, split_special_tokens=not special_tokens)
        try:
            if limit is not None:
                texts = [self._leading(text, limit, encode) for text in texts]
            encoded = encode(texts)
        finally:
            backend.post_processor = processor
        return [
            (ids, byte_ends(text, [self._token_bytes[token_id] for token_id in ids], encoding.offsets))
            for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True)
        ]

    def _leading(self, text: str, limit: int, encode: Callable[[list[str]], Any]) -> str:
        """Return `leading_text`, or the whole text if an added token of several words could be cut."""
        if len(text) < 32 * (limit + 1) or any(" " in token.strip() for token in self.tokenizer.get_added_vocab()):
            return text
        return leading_text(text, limit, lambda start: encode([start])[0], words_apart=self._words_apart)

    @cached_property
    def _words_apart(self) -> bool:
        """Whether no token spells a space after another character."""
        return not any(b" " in token.lstrip(b" ") for token in self.token_bytes() if token is not None)

    def spelling(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Decode token ids that a model generated, and compute the offset at which each token ends.

        Unlike those of `response_ids`, the ids need not be the tokens into which the tokenizer splits the text. Special
        tokens are part of the text.

        Returns:
            The text, and the end of each token in its UTF-8 bytes, as `response_ids` returns them.
        """
        decode = partial(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, pieces = decode(list(ids)), [self._token_bytes[token_id] for token_id in ids]
        ends = exact_ends(text, pieces)
        if ends is not None:
            return text, ends
        before = [decode(list(ids[:count])) for count in range(len(ids) + 1)]
        kept = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(part, text))) for part in before]  # noqa: B905
        # a token whose last character changes when more tokens follow ends inside this character
        stops = [min(count + (count < len(part)), len(text)) for count, part in zip(kept, before, strict=True)]
        return text, byte_ends(text, pieces, list(zip(kept[:-1], stops[1:], strict=True)))


def _leading_ids(tokenizer: Any) -> list[int]:
    """Find the tokens that the tokenizer's post-processor puts before any text."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return []
    unused = 2**32 - 1  # larger than any vocabulary
    ids: list[int] = processor.process(Tokenizer(WordLevel({"text": unused}, unk_token="text")).encode("text")).ids
    return ids[: ids.index(unused)]
