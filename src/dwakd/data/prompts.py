"""Render a row as a prompt, which is the text that a model reads before its answer.

Templates: `alpaca` (used by the paper), `chat` (each model's own chat template), `plain`, or a format string with
`{instruction}` and optionally `{input}`. A format string without `{input}` omits the input.

Earlier turns: `chat` passes them to the model's template, with all their keys and with the row's tools and documents.
A row with a part that the template omits is refused. The other templates have no turns. They put the texts of the
turns before the instruction, in order and separated by empty lines. A system text is unchanged. Other turns begin with
their role, "User: " or "Assistant: ", and so does the instruction if such a turn precedes it.
"""

import string
from typing import Any

from dwakd.data.chat import ChatTemplate, tokenizer_name
from dwakd.data.rows import Example
from dwakd.data.turns import content_keys, structured
from dwakd.errors import UserError

_TEMPLATES = {  # without and with an input
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}
TEMPLATES = ("alpaca", "chat", "plain")


def check_template(template: str) -> None:
    """Refuse a string that is neither the name of a template nor a format string with the right placeholders.

    Examples:
        >>> check_template("Q: {instruction}\\nA: ")
        >>> check_template("vicuna")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dwakd.errors.UserError: data.template 'vicuna' is unknown: use alpaca, chat, plain, or a format string ...
    """
    if template in TEMPLATES:
        return
    what = f"data.template {template!r}"
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{what} is not a valid format string ({error}): write literal braces twice") from error
    if not fields:
        names = ", ".join(TEMPLATES)
        raise UserError(f"{what} is unknown: use {names}, or a format string with {{instruction}} and {{input}}")
    for name, spec, conversion in fields:
        if name not in ("instruction", "input") or spec or conversion:
            shown = (name or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"{what} has the unknown placeholder {{{shown}}}: "
                "use {instruction} and {input}, and write literal braces twice"
            )
    if all(name != "instruction" for name, _, _ in fields):
        raise UserError(f"{what} lacks the placeholder {{instruction}}: add it")


class Prompts:
    """Render prompts with one template for one tokenizer.

    Args:
        template: a name of `TEMPLATES` or a format string.
        tokenizer: tokenizer of the model that reads the prompts.
        date: ISO date that a chat template prints as today's date. Default: the current date.

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
        if self.chat is not None:
            return self.chat.prompt(example)
        hidden = [f"{key!r} of turn {n}" for n, turn in enumerate(example.turns) for key in content_keys(turn)]
        hidden += map(repr, structured(example.options or {}))
        if hidden:
            raise UserError(
                f"{example.place}: the row has {hidden[0]}, which only a chat template can show: "
                "use data.template: chat, or remove it"
            )
        variants = _TEMPLATES.get(self.template, (self.template, self.template))
        return variants[bool(example.input)].format(instruction=_with_history(example), input=example.input)

    def end_token_id(self) -> int:
        """Return the id of the token that the model is trained to write at the end of a response.

        For `chat` this is the special token that the template writes directly after the assistant's text
        (`<|im_end|>`, `<end_of_turn>`, ...). If it writes none there, and for every other template, it is the
        end-of-sequence token. A tokenizer without one is refused.
        """
        tokenizer = self.tokenizer
        if self.chat is not None:
            ids = tokenizer(self.chat.tail.lstrip(), add_special_tokens=False)["input_ids"]
            if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids):
                return int(ids[0])
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer_name(tokenizer)} has no end-of-sequence token, so that answers would "
                "never end: set eos_token in its tokenizer_config.json"
            )
        return int(tokenizer.eos_token_id)


def _with_history(example: Example) -> str:
    turns = [*example.history, {**(example.turn or {"role": "user"}), "content": example.instruction}]
    labels = ["" if turn["role"] == "system" else f"{turn['role'].capitalize()}: " for turn in turns]
    if not any(labels[:-1]):
        labels[-1] = ""
    return "\n\n".join(label + turn["content"] for label, turn in zip(labels, turns, strict=True))
