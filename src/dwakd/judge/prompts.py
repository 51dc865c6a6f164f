"""The prompt of the judge, and how its reply is read."""

from __future__ import annotations

import re
from pathlib import Path

from dwakd.errors import UserError, explained

PROMPT = Path(__file__).with_name("prompt.txt")
_FIELDS = ("{question}", "{first}", "{second}")
_MARKED = re.compile(r"\[\[(A|B|C|Tied?)\]\]", re.IGNORECASE)
_NOUN = r"(?:my |the )?(?:verdict|winner|answer|response|assistant)\W+(?:is\W+|of\W+)?"
_VERDICT = re.compile(rf"\W*(?:{_NOUN})*(A|B|Tied?)\W*", re.IGNORECASE)
_HEADING = re.compile(r":\W*$")
_SCORES = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5, "tied": 0.5}


def read_prompt(path: str | Path | None) -> str:
    """Return the prompt in a file, `PROMPT` by default. Raises a UserError if a field is missing."""
    with explained(f"the prompt {path} cannot be read"):
        text = Path(path or PROMPT).read_text(encoding="utf-8")
    if missing := [field for field in _FIELDS if field not in text]:
        raise UserError(f"the prompt {path} must contain {', '.join(_FIELDS)}; add {missing[0]}")
    return text


def fill(template: str, *texts: str) -> str:
    """Fill in question, first and second answer. Braces in these texts stay as they are."""
    values = dict(zip(_FIELDS, texts, strict=True))
    return re.sub("|".join(map(re.escape, _FIELDS)), lambda match: values[match[0]], template)


def read_verdict(reply: str, *, complete: bool = True) -> float | None:
    r"""Return 1 if a reply prefers the first answer, 0.5 for a tie, 0 for the second answer, None without a verdict.

    The last of [[A]], [[B]], [[C]] and [[Tie]] counts. Without them, the last or else the first line must be a verdict, if
    the reply is `complete`. A line that ends with a colon is a heading. Text before </think> is ignored.

    Examples:
        >>> [read_verdict(reply) for reply in ("A", "**Tied**.", "Both are fine.\nVerdict: B", "A or B?")]
        [1.0, 0.5, 0.0, None]
    """
    thoughts, _, text = reply.rpartition("</think>")
    text = text.strip()
    if not thoughts and text.startswith("<think>"):
        return None
    if marked := _MARKED.findall(text):
        return _SCORES[marked[-1].lower()]
    lines = text.splitlines() if complete else []
    candidates = [line for line in [*lines[-1:], *lines[:1]] if not _HEADING.search(line)]
    found = next(filter(None, map(_VERDICT.fullmatch, candidates)), None)
    return _SCORES[found[1].lower()] if found else None
