"""Read special tokens that a row spells out as text, while those that the template writes stay special."""

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
    """Render and tokenise prompts so that only the template can write special tokens.

    Before the template is applied, special tokens in the row are replaced by placeholders. All special tokens of the
    rendered prompt then come from the template. They are replaced by aliases, and the placeholders by the original
    text. A copy of the tokenizer has the aliases as added tokens and reads special tokens as text.

    Args:
        prompts: the template and its fast tokenizer, which is not changed.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts, self._original = prompts, prompts.tokenizer
        tokenizer = prompts.tokenizer
        self._tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        nonce = secrets.token_hex(8)  # random, so that no row contains an alias or a placeholder
        self._aliases = {content: f"\ufdd0{n}a{nonce}\ufdd1" for n, content in enumerate(self._tokens)}
        self._placeholders = {content: f"\ufdd0{n}p{nonce}\ufdd1" for n, content in enumerate(self._tokens)}

    @cached_property
    def tokenizer(self) -> Any:
        """The copy of the tokenizer that has the aliases as added tokens."""
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
        """Render the prompt of a row with the template's special tokens replaced by aliases."""
        hidden = _map_strings(dataclasses.asdict(example), self._hide)
        text = self._prompts.render(dataclasses.replace(example, **hidden))
        text = self._pattern.sub(lambda found: self._aliases[found[0]], text)
        for content, placeholder in self._placeholders.items():
            text = text.replace(placeholder, content)
        return text

    def restore(self, ids: Sequence[int], example: Example) -> list[int]:
        """Replace the aliases in a tokenised prompt by the template's special tokens.

        Args:
            ids: token ids of the text that `render` returned.
            example: the row, for the message.

        Raises:
            UserError: the tokenizer reads special tokens even in plain text, as Unigram tokenizers may.
        """
        to_id = self.tokenizer.convert_tokens_to_ids
        unknown = self._original.unk_token  # stands for characters outside the vocabulary
        found = next((token for token in self._tokens if token != unknown and to_id(token) in ids), None)
        if found is not None:
            raise UserError(
                f"row {example.index} (counting from 0): the tokenizer of {tokenizer_name(self._original)} reads "
                f"{found!r} as a special token even in plain text: remove it from that row or set "
                "data.special_tokens_in_prompts: parse"
            )
        special = {to_id(alias): to_id(content) for content, alias in self._aliases.items()}
        return [special.get(token_id, token_id) for token_id in ids]

    def _hide(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._placeholders[found[0]], text)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string inside a value, except the keys of dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_strings(item, change) for item in value)
    return value
