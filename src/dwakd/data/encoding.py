"""Encode prompts and responses with one tokenizer, and compute where each token ends in the bytes of the response."""

import copy
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from dwakd.data.chat import check_tokenizer, tokenizer_name
from dwakd.data.long_text import leading_text
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example, check_choice
from dwakd.data.token_bytes import TokenBytes, byte_ends, exact_ends
from dwakd.data.turns import texts_to_show
from dwakd.errors import UserError


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
        check_tokenizer(tokenizer, tokenizer_name(tokenizer))
        check_choice("data.bos", bos, ("auto", "never"))
        check_choice("data.special_tokens_in_prompts", special_tokens_in_prompts, ("parse", "text"))
        self.tokenizer = tokenizer
        self.template = template
        self.special_tokens_in_prompts = special_tokens_in_prompts
        self._prompts = Prompts(template, tokenizer, date)
        chat = self._prompts.chat
        self.date = None if chat is None else chat.date
        """The date that a chat template prints as today's date; None for other templates."""
        self.printed_date = self.date if chat is not None and chat.prints_date else None
        """The value of `date` if the chat template prints it, else None."""
        self.end_token_id = self._prompts.end_token_id()
        self._bos_ids = _leading_ids(tokenizer) if bos == "auto" and template != "chat" else []
        self._token_bytes = TokenBytes(tokenizer)
        self._special_as_text = _SpecialTokensAsText(self._prompts)

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
            encoded = _encode(self.tokenizer, texts, split_special_tokens=True)["input_ids"] if texts else []
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
        """Compute `prompt_ids` of several rows at once."""
        if self.special_tokens_in_prompts == "parse":
            encoded = _encode(self.tokenizer, map(self.prompt_text, examples), split_special_tokens=False)["input_ids"]
        else:
            encoded = self._special_as_text.encode(examples)
        return [[*self._bos_ids, *ids] for ids in encoded]

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
        encode = partial(_encode, self.tokenizer, split_special_tokens=not special_tokens)
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


class _SpecialTokensAsText:
    """Tokenise prompts so that only the template can write special tokens.

    Special tokens in the row are replaced by placeholders before the template is applied. Those in the rendered prompt
    are then the template's. They become aliases, which are added tokens of a copy of the tokenizer, and the placeholders
    become the original text again, which the copy reads as plain text.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        added = prompts.tokenizer.added_tokens_decoder.values()
        self._tokens = {token.content: token for token in added if token.special}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        nonce = secrets.token_hex(8)  # random, so that no row contains an alias or a placeholder
        self._aliases = {content: f"\ufdd0{n}a{nonce}\ufdd1" for n, content in enumerate(self._tokens)}
        self._placeholders = {content: f"\ufdd0{n}p{nonce}\ufdd1" for n, content in enumerate(self._tokens)}

    @cached_property
    def _tokenizer(self) -> Any:
        """The copy of the tokenizer that has the aliases as added tokens."""
        copied = copy.deepcopy(self._prompts.tokenizer)
        for token in self._tokens.values():
            sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            copied.add_tokens(AddedToken(self._aliases[token.content], normalized=False, **sides))
        return copied

    def find(self, text: str) -> str | None:
        """Return the first special token that a text spells out, or None."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Tokenise the prompts of rows; refuse a tokenizer that reads special tokens even in plain text (Unigram)."""
        to_id, original = self._tokenizer.convert_tokens_to_ids, self._prompts.tokenizer
        special = {to_id(alias): to_id(content) for content, alias in self._aliases.items()}
        forbidden = {to_id(content): content for content in self._tokens if content != original.unk_token}
        encoded = _encode(self._tokenizer, map(self._render, examples), split_special_tokens=True)["input_ids"]
        for ids, example in zip(encoded, examples, strict=True):
            if found := [forbidden[token_id] for token_id in ids if token_id in forbidden]:
                raise UserError(
                    f"{example.place}: the tokenizer of {tokenizer_name(original)} reads {found[0]!r} as a special token "
                    "even in plain text: remove it from that row or set data.special_tokens_in_prompts: parse"
                )
        return [[special.get(token_id, token_id) for token_id in ids] for ids in encoded]

    def _render(self, example: Example) -> str:
        """Render the prompt of a row with the template's special tokens replaced by aliases."""
        hide = partial(self._pattern.sub, lambda found: self._placeholders[found[0]])
        hidden = _map_strings(asdict(example), hide)
        text = self._pattern.sub(lambda found: self._aliases[found[0]], self._prompts.render(Example(**hidden)))
        for content, placeholder in self._placeholders.items():
            text = text.replace(placeholder, content)
        return text


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string inside a value, except the keys of dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_strings(item, change) for item in value)
    return value


def _encode(tokenizer: Any, texts: Iterable[str], *, split_special_tokens: bool) -> Any:
    options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), split_special_tokens=split_special_tokens, **options)


def _leading_ids(tokenizer: Any) -> list[int]:
    """Find the tokens that the tokenizer's post-processor puts before any text."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return []
    unused = 2**32 - 1  # larger than any vocabulary
    ids: list[int] = processor.process(Tokenizer(WordLevel({"text": unused}, unk_token="text")).encode("text")).ids
    return ids[: ids.index(unused)]
