"""From a row to the text that a model reads before it answers.

Templates: `alpaca` (the paper's), `chat` (each model's own chat template), `plain`, or a format string with
`{instruction}` and, if wanted, `{input}` (a format string without it leaves the input out).

Earlier turns: `chat` hands them to the model's template. The other templates know no turns, so the turns are
joined in front of the instruction, in order, with empty lines between them: a system text as it stands, the other
turns led by "User: " and "Assistant: " (the last user turn as well, if any such turn came before it).
"""

import string
from typing import Any

from dwakd.data.rows import Example
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
_MARK = "zyxanswerxyz"


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


def render_prompt(example: Example, template: str, tokenizer: Any) -> str:
    """The prompt text of one row, the response not included.

    Args:
        example: instruction, input and earlier turns.
        template: a name of `TEMPLATES` or a format string.
        tokenizer: read by `chat` only, for its own chat template.

    Raises:
        UserError: an unknown template, a tokenizer without chat template, or a chat template that refuses the row.
    """
    if template == "chat":
        content = f"{example.instruction}\n{example.input}" if example.input else example.instruction
        messages = [*example.history, {"role": "user", "content": content}]
        return _render_chat(messages, tokenizer, add_generation_prompt=True, row=example.index)
    check_template(template)
    instruction = _with_history(example)
    if template == "alpaca":
        template = ALPACA_WITH_INPUT if example.input else ALPACA_WITHOUT_INPUT
    elif template == "plain":
        template = "{instruction}\n{input}\n" if example.input else "{instruction}\n"
    return template.format(instruction=instruction, input=example.input)


def end_token_id(tokenizer: Any, template: str) -> int:
    """The token that is trained to end a response.

    For `chat` the special token which the model's own template puts right after the assistant's text (`<|im_end|>`,
    `<end_of_turn>`, ...), found by rendering; the end-of-sequence token if the template puts none there, and for
    every other template.

    Raises:
        UserError: there is no such token.
    """
    if template == "chat":
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
        text = _render_chat(messages, tokenizer, add_generation_prompt=False)
        tail = text[text.rfind(_MARK) + len(_MARK) :].lstrip() if _MARK in text else ""
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in tokenizer.all_special_ids):
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer_name(tokenizer)} has no end-of-sequence token, so no answer would ever "
            "end: set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def tokenizer_name(tokenizer: Any) -> str:
    """The name to call a tokenizer by in a message."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def _with_history(example: Example) -> str:
    turns = [
        turn["content"] if turn["role"] == "system" else f"{turn['role'].capitalize()}: {turn['content']}"
        for turn in example.history
    ]
    earlier = any(turn["role"] != "system" for turn in example.history)
    return "\n\n".join([*turns, f"User: {example.instruction}" if earlier else example.instruction])


def _render_chat(
    messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool, row: int | None = None
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"data.template is chat, but the tokenizer of {tokenizer_name(tokenizer)} has no chat template: "
            "use data.template: alpaca, or add a chat_template to its tokenizer_config.json"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates raise what they like: jinja2's TemplateError, TypeError, ...
        where = "" if row is None else f" row {row} (counting from 0)"
        raise UserError(
            f"the chat template of {tokenizer_name(tokenizer)} refuses{where or ' a plain exchange'}: {error} "
            "(change the roles of that row's messages, or use data.template: alpaca)"
        ) from error
