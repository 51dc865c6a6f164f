"""The prompt templates, and the check of an option that names one or is a format string."""

import re
from datetime import date
from typing import Any

from dwakd.errors import UserError

# The text without and with an input. The response follows directly: end the text with the space or line break before it.
TEMPLATES: dict[str, tuple[str, str]] = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}
TEMPLATE_CHOICES = f"{', '.join(TEMPLATES)}, chat, or a format string with {{instruction}} and {{input}}"


def check_date(value: Any) -> Any:
    """Return a date as text in ISO format; refuse text that is not. YAML reads 2026-01-31 as a date."""
    if isinstance(value, date):
        return value.isoformat()
    try:
        return value if value is None else date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise UserError(f"data.template_date must be a date such as 2026-01-31, got {value!r:.40}") from None


def check_template(template: str) -> None:
    """Refuse a string that is neither the name of a template nor a format string with the right placeholders.

    Examples:
        >>> check_template("Q: {instruction}\\nA: ")
        >>> check_template("no-such")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dwakd.errors.UserError: data.template 'no-such' is unknown: use alpaca, ...
    """
    if template == "chat" or template in TEMPLATES:
        return
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data.template {template!r} is not valid Unicode text ({error.reason})") from error
    unescaped = template.replace("{{", "").replace("}}", "")
    found = re.findall(r"\{[^{}]*\}", unescaped)
    unknown = [name for name in found if name not in ("{instruction}", "{input}")]
    problem = ""
    if len(found) != unescaped.count("{") or len(found) != unescaped.count("}"):
        problem = "is not a valid format string: write literal braces twice"
    elif not found:
        problem = f"is unknown: use {TEMPLATE_CHOICES}"
    elif unknown:
        problem = f"has the unknown placeholder {unknown[0]}: use {{instruction}} and {{input}}, and write literal braces twice"
    elif "{instruction}" not in found:
        problem = "lacks the placeholder {instruction}: add it"
    if problem:
        raise UserError(f"data.template {template!r} {problem}")
