"""Write the parts of pages that are generated from the code: `python docs/generated.py`.

A part is between two comments in Markdown, such as `<!-- options -->` and `<!-- /options -->`.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from dwakd.describe import method_sections, option_rows
from dwakd.losses import METHODS, method_class
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.training import ELSEWHERE, DistillConfig

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / "docs" / "methods" / f"{name}.md" for name in METHODS), ROOT / "docs" / "recipe.md"]
_PART = re.compile(
    r"(?P<start><!-- (?P<name>\w+)(?: (?P<argument>\S+))? -->).*?(?P<end><!-- /(?P=name) -->)", re.DOTALL
)


def filled(page: Path) -> str:
    """Return the text of a page with its generated parts as the code has them now."""

    def replace(found: re.Match[str]) -> str:
        is_recipe = page.stem == "recipe"
        text = (
            section_options(found["argument"]) if is_recipe else generated(page.stem, found["name"], found["argument"])
        )
        return f"{found['start']}\n\n{text}\n\n{found['end']}"

    return _PART.sub(replace, page.read_text(encoding="utf-8"))


def generated(name: str, part: str, argument: str | None) -> str:
    """Return a generated part of the page of a method."""
    intro, sections = method_sections(name)
    if part == "formula":
        return intro
    if part == "requirements":
        return table(("", "with the default options"), requirements(name))
    if part == "options":
        rows = [(f"`{row[0]}`", f"`{row[1]}`", *row[2:]) for row in option_rows(name)]
        return (
            table(("option", "default", "meaning", "allowed values"), rows) if rows else "This method has no options."
        )
    if part == "recipe":
        path = f"recipes/methods/{name}.yaml"
        loss = re.search(r"^loss:\n(?: .*\n)*", (ROOT / path).read_text("utf-8"), re.MULTILINE)
        return f"The section `loss` of [{path}](../../{path}):\n\n```yaml\n{loss and loss[0]}```"
    if part == "references":
        return " ".join(sections["References"].split())
    if part == "signature":
        return f"Signature of the evaluation: {signature(str(argument))}."
    raise ValueError(f"docs/methods/{name}.md: unknown part {part}")


def requirements(name: str) -> list[tuple[str, str]]:
    """List what a method needs with its default options, and where a variant differs."""
    kind = method_class(name).options_type

    def answers(options: Any) -> dict[str, str]:
        weight = {"Weight of the cross-entropy": f"{options.cross_entropy_weight:g}"}
        if not options.needs_teacher:
            return {"Teacher": "not used", **weight}
        on_policy = ("yes, below 1" if options.needs_given else "yes") if options.supports_sampled else "no"
        return {
            "Teacher": "required",
            "Tokenizers": "must be the same" if options.needs_same_vocabulary else "any two",
            "[Teacher cache](../cache.md)": "no" if options.needs_attention else "yes",
            "[Served teacher](../scale.md#served-teachers)": "yes" if options.needs_only_log_probs else "no",
            "[On-policy](../on-policy.md) (`training.lmbda`)": on_policy,
            **weight,
        }

    found = answers(kind())
    for variant in kind.variant_defaults:
        for label, answer in answers(kind(variant=variant)).items():
            if answer != answers(kind())[label]:
                found[label] += f"; with `variant: {variant}` {answer}"
    return [*found.items(), ("Terms in the log", ", ".join(f"`{term}`" for term in method_class(name).terms))]


def section_options(section: str) -> str:
    """Write the table of the options of a section of a recipe."""
    if section == "training":
        own = [field for field in dataclasses.fields(DistillConfig) if field.name in DistillConfig.__annotations__]
        rows = [(field.name, field.default, field.metadata["help"]) for field in own if field.name not in ELSEWHERE]
    else:
        kind: Any = Recipe.model_fields[section].annotation
        fields = (typing.get_args(kind) or [kind])[0].model_fields
        rows = [(name, field.get_default(), field.description) for name, field in fields.items()]
    defaults = ["required" if row[1] is PydanticUndefined else f"`{json.dumps(row[1])}`" for row in rows]
    lines = [(f"`{name}`", default, text) for (name, _, text), default in zip(rows, defaults, strict=True)]
    return table(("option", "default", "meaning"), lines)


def signature(run: str) -> str:
    """Describe how a run of docs/results/two-teachers was evaluated."""
    scores = json.loads((ROOT / "docs" / "results" / "two-teachers" / "scores.json").read_text("utf-8"))
    values: dict[str, Any] = scores[run]["evaluation"]["signature"]
    flat = {**values, "model": "", "data": f"{values['data']['rows']} rows of {values['data']['name']}", "versions": ""}
    words = [f"{key} {value}" for key, value in flat.items() if value != ""]
    return ", ".join([*words, *(f"{package} {version}" for package, version in values["versions"].items())])


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path), encoding="utf-8")
