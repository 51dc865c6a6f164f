"""Render a row as a prompt, which is the text that a model reads before its answer.

A template is `chat` (each model's own chat template), a name in `TEMPLATES` (the paper uses `alpaca`), or a format string
with `{instruction}` and optionally `{input}`. A format string without `{input}` omits the input.

Earlier turns: `chat` passes them to the model's template, with all their keys and with the row's tools and documents.
A row with a part that the template omits is refused. The other templates have no turns. They put the texts of the
turns before the instruction, in order and separated by empty lines. A system text is unchanged. Other turns begin with
their role, "User: " or "Assistant: ", and so does the instruction if such a turn precedes it.
"""

from typing import Any

from dwakd.data.chat import ChatTemplate
from dwakd.data.rows import Example
from dwakd.data.templates import TEMPLATES, check_template
from dwakd.data.turns import content_keys, structured
from dwakd.errors import UserError


class Prompts:
    """Render prompts with one template for one tokenizer. `date` is the ISO date that a chat template prints as today's.

    Raises:
        UserError: the template is unknown, or it is `chat` and the tokenizer has no chat template.
    """

    def __init__(self, template: str, tokenizer: Any, date: str | None = None) -> None:
        check_template(template)
        self.template = template
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer, date) if template == "chat" else None

    def render(self, example: Example) -> str:
        """Render the prompt of a row, without its response; refuse a row with parts that the template cannot show."""
        try:
            return self._render(example) if self.chat is None else self.chat.prompt(example)
        except UserError as error:
            raise UserError(f"{example.place}: {error}") from error

    def answer(self, example: Example) -> str:
        """Render the answer of a row that has tool calls or reasoning, without an end token."""
        keys = content_keys(example.answer or {"role": "assistant"})
        if self.chat is None:
            fix = "use data.template: chat, or remove it"
            raise UserError(f"{example.place}: the answer has {keys[0]!r}, which only a chat template can show: {fix}")
        try:
            return self.chat.answer(example)
        except UserError as error:
            raise UserError(f"{example.place}: {error}") from error

    def _render(self, example: Example) -> str:
        given = enumerate(example.turns)
        hidden = [f"{key!r} of {example.turn_place(n)}" for n, turn in given for key in content_keys(turn)]
        hidden += map(repr, structured(example.options or {}))
        if hidden:
            fix = "use data.template: chat, or remove it"
            raise UserError(f"the row has {hidden[0]}, which only a chat template can show: {fix}")
        variants = TEMPLATES.get(self.template, (self.template, self.template))
        turns = [*example.history, {**(example.turn or {"role": "user"}), "content": example.instruction}]
        labels = ["" if turn["role"] == "system" else f"{turn['role'].capitalize()}: " for turn in turns]
        if not any(labels[:-1]):
            labels[-1] = ""
        texts = "\n\n".join(label + turn["content"] for label, turn in zip(labels, turns, strict=True))
        return variants[bool(example.input)].format(instruction=texts, input=example.input)

    def end_token_id(self) -> int:
        """Return the id of the token that the model is trained to write at the end of a response.

        For `chat` this is the special token that the template writes directly after the assistant's text
        (`<|im_end|>`, `<end_of_turn>`, ...). If it writes none there, and for every other template, it is the
        end-of-sequence token.
        """
        tokenizer = self.tokenizer
        if self.chat is not None:
            ids = tokenizer(self.chat.tail.lstrip(), add_special_tokens=False)["input_ids"]
            if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids):
                return int(ids[0])
        return int(tokenizer.eos_token_id)
