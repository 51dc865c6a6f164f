"""From a row to the text that a model reads before it answers.

Templates: `alpaca` (the paper's), `chat` (each model's own chat template), `plain`, or a format string with
`{instruction}` and, if wanted, `{input}` (a format string without it leaves the input out).

Earlier turns: `chat` hands them to the model's template, with all their keys and with the row's tools and documents;
a row with a part that the template leaves out is refused. The other templates know no turns, so the texts of the turns
are joined in front of the instruction, in order, with empty lines between them: a system text as it stands, the other
turns led by their role, "User: " or "Assistant: " (the last turn as well, if any such turn came before it).
"""

import string
from typing import Any

from dwakd.data.chat import ChatTemplate, tokenizer_name
from dwakd.data.rows import Example
from dwakd.data.turns import content_keys, structured
from dwakd.errors import UserError

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
TEMPLATES = ("alpaca", "chat", "plain")
PLACEHOLDERS = ("instruction", "input")


def check_template(template: str) -> None:
    """Refuse what is neither the name of a template nor a format string.

    Raises:
        UserError: the name is unknown, the braces do not match, or a placeholder is unknown or missing.

    Examples:
        >>> check_template("Q: {instruction}\\nA: ")
        >>> check_template("vicuna")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dwakd.errors.UserError: data.template 'vicuna' is unknown: use alpaca, chat, plain, or a format string ...
    """
    if template in TEMPLATES:
        return
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"data.template {template!r} is no format string ({error}): write literal braces twice"
        ) from error
    if not fields:
        raise UserError(
            f"data.template {template!r} is unknown: use {', '.join(TEMPLATES)}, "
            "or a format string with {instruction} and {input}"
        )
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS or spec or conversion:
            shown = (name or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(
                f"data.template {template!r} has the unknown placeholder {{{shown}}}: "
                "only {instruction} and {input} are filled in (write literal braces twice)"
            )
    if all(name != "instruction" for name, _, _ in fields):
        raise UserError(f"data.template {template!r} never shows the instruction: put {{instruction}} into it")


class Prompts:
    """The prompts of one template and tokenizer.

    Args:
        template: a name of `TEMPLATES` or a format string.
        tokenizer: of the model that reads them.
        date: ISO date that a chat template prints as today's; the current date by default.

    Raises:
        UserError: an unknown template, or a tokenizer without chat template.
    """

    def __init__(self, template: str, tokenizer: Any, date: str | None = None) -> None:
        check_template(template)
        self.template = template
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer, date) if template == "chat" else None

    def render(self, example: Example) -> str:
        """The prompt text of one row, the response not included.

        Raises:
            UserError: the chat template refuses the row, or the row has parts that the template cannot show.
        """
        if self.chat is not None:
            return self.chat.prompt(example)
        _check_plain(example)
        instruction, template = _with_history(example), self.template
        if template == "alpaca":
            template = ALPACA_WITH_INPUT if example.input else ALPACA_WITHOUT_INPUT
        elif template == "plain":
            template = "{instruction}\n{input}\n" if example.input else "{instruction}\n"
        return template.format(instruction=instruction, input=example.input)

    def end_token_id(self) -> int:
        """The token that is trained to end a response.

        For `chat` the special token which the model's own template puts right after the assistant's text
        (`<|im_end|>`, `<end_of_turn>`, ...), found by rendering; the end-of-sequence token if the template puts none
        there, and for every other template.

        Raises:
            UserError: there is no such token.
        """
        tokenizer = self.tokenizer
        if self.chat is not None:
            ids = tokenizer(self.chat.tail.lstrip(), add_special_tokens=False)["input_ids"]
            if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids):
                return int(ids[0])
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer_name(tokenizer)} has no end-of-sequence token, so no answer would ever "
                "end: set eos_token in its tokenizer_config.json"
            )
        return int(tokenizer.eos_token_id)


def render_prompt(example: Example, template: str, tokenizer: Any) -> str:
    """`Prompts.render` of a single row."""
    return Prompts(template, tokenizer).render(example)


def end_token_id(tokenizer: Any, template: str) -> int:
    """`Prompts.end_token_id` of a tokenizer."""
    return Prompts(template, tokenizer).end_token_id()


def _check_plain(example: Example) -> None:
    """Refuse parts that only a chat template can show."""
    keys = [(key, f" of turn {n}") for n, turn in enumerate(example.turns) for key in content_keys(turn)]
    keys += [(key, "") for key in structured(example.options or {})]
    for key, place in keys:
        raise UserError(
            f"row {example.index} (counting from 0): it has {key!r}{place}, which only a chat template can show: "
            "use data.template: chat, or remove it"
        )


def _with_history(example: Example) -> str:
    *earlier, last = [
        (
            turn["role"],
            turn["content"] if turn["role"] == "system" else f"{turn['role'].capitalize()}: {turn['content']}",
        )
        for turn in (*example.history, {**(example.turn or {"role": "user"}), "content": example.instruction})
    ]
    led = any(role != "system" for role, _ in earlier)
    return "\n\n".join([*(text for _, text in earlier), last[1] if led else example.instruction])
