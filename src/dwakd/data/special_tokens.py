"""Special tokens: tokenise those that rows spell out as text, and find those that need no embedding."""

import copy
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

from tokenizers import AddedToken

from dwakd.data.chat import tokenizer_name
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.errors import UserError


class SpecialTokensAsText:
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
        encoded = encode_texts(self._tokenizer, map(self._render, examples), split_special_tokens=True)["input_ids"]
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


def needed_embeddings(tokenizer: Any) -> int:
    """Return the number of embeddings that a tokenizer needs: its largest id + 1, more than its tokens if ids are unused.

    Special tokens that no prompt contains, such as that of Gemma 3 for images, are not counted.
    """
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    unused = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in named and token.content not in str(tokenizer.chat_template)
    }
    return max(token_id for token, token_id in tokenizer.get_vocab().items() if token not in unused) + 1


def encode_texts(tokenizer: Any, texts: Iterable[str], *, split_special_tokens: bool) -> Any:
    """Tokenise texts without adding special tokens; with `split_special_tokens`, those in the texts are read as text."""
    options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), split_special_tokens=split_special_tokens, **options)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string inside a value, except the keys of dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_strings(item, change) for item in value)
    return value
