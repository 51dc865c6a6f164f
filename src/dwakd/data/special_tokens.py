"""Special tokens spelled out in a row, read as text, while those that the template writes stay special."""

import copy
import dataclasses
import re
import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from dwakd.data.chat import tokenizer_name
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.errors import UserError

CHOICES = ("parse", "text")


class SpecialTokensAsText:
    """Renders and tokenises prompts so that only the template can write special tokens.

    The rows' special tokens are replaced by placeholders before the template is applied. The special tokens of the
    rendered prompt are then the template's. These are replaced by aliases, which a copy of the tokenizer knows as added
    tokens that are not special, and the placeholders by what they stand for. The copy reads special tokens as text.

    Args:
        prompts: the template and its fast tokenizer, which is left as it is.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts, self._original = prompts, prompts.tokenizer
        tokenizer = prompts.tokenizer
        self._tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        nonce = secrets.token_hex(8)  # no row can contain an alias or a placeholder
        self._aliases = {content: f"\ufdd0{n}a{nonce}\ufdd1" for n, content in enumerate(self._tokens)}
        self._placeholders = {content: f"\ufdd0{n}p{nonce}\ufdd1" for n, content in enumerate(self._tokens)}

    @cached_property
    def tokenizer(self) -> Any:
        """The copy that knows the aliases."""
        copied = copy.deepcopy(self._original)
        options = ("lstrip", "rstrip", "single_word")
        copied.add_tokens(
            [
                AddedToken(alias, normalized=False, **{name: getattr(self._tokens[content], name) for name in options})
                for content, alias in self._aliases.items()
            ]
        )
        return copied

    def render(self, example: Example) -> str:
        """The prompt of a row, with the template's special tokens replaced by aliases."""
        hidden = _map_strings(dataclasses.asdict(example), self._hide)
        text = self._prompts.render(dataclasses.replace(example, **hidden))
        text = self._pattern.sub(lambda found: self._aliases[found[0]], text)
        for content, placeholder in self._placeholders.items():
            text = text.replace(placeholder, content)
        return text

    def restore(self, ids: Sequence[int], example: Example) -> list[int]:
        """The tokens of a prompt that `render` returned, with the template's special tokens in place of the aliases.

        Raises:
            UserError: the tokenizer finds special tokens even in plain text, as Unigram may.
        """
        to_id = self.tokenizer.convert_tokens_to_ids
        unknown = self._original.unk_token  # characters outside the vocabulary become this one
        found = next((token for token in self._tokens if token != unknown and to_id(token) in ids), None)
        if found is not None:
            raise UserError(
                f"row {example.index} (counting from 0): the tokenizer of {tokenizer_name(self._original)} reads "
                f"{found!r} as a special token even where it is text: remove it from that row or set "
                "data.special_tokens_in_prompts: parse"
            )
        special = {to_id(alias): to_id(content) for content, alias in self._aliases.items()}
        return [special.get(token_id, token_id) for token_id in ids]

    def _hide(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._placeholders[found[0]], text)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, but for the keys of dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_strings(item, change) for item in value)
    return value
