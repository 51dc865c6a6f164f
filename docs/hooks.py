"""Hooks of mkdocs: parts of pages that are generated from the code, notebooks as pages, and links to the repository."""

import dataclasses
import json
import logging
import posixpath
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pydantic_core import PydanticUndefined

from dwakd.describe import method_sections, option_rows
from dwakd.losses import METHODS, method_class
from dwakd.recipe.recipe import Recipe
from dwakd.recipe.training import ELSEWHERE, DistillConfig

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> None:
    """Add the page of each method to the section Methods, in the order of METHODS."""
    (pages,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    pages += [{name: f"methods/{name}.md"} for name in METHODS]


def on_files(files: Any, config: Any) -> None:
    """Add a page for each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            cells = json.loads(Path(file.abs_src_path).read_text("utf-8"))["cells"]
            page = notebook_page(cells, posixpath.basename(file.src_uri))
            files.append(File.generated(config, file.src_uri.removesuffix("ipynb") + "md", content=page))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the generated parts of the page of a method, and link files outside docs/ to the repository."""
    folder, name = posixpath.split(page.file.src_uri.removesuffix(".md"))
    if folder == "methods" and name in METHODS:
        markdown = re.sub(r"<!-- (\w+)(?: (\S+))? -->", lambda found: generated(name, *found.groups()), markdown)
    if name == "recipe":
        markdown = re.sub(r"<!-- options (\w+) -->", lambda found: section_options(found[1]), markdown)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, found[1]))
        target = ROOT / path
        if path.startswith("docs/") and not target.is_dir():
            return found[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        return f"]({config.extra['repository']}/{'tree' if target.is_dir() else 'blob'}/main/{path})"

    return re.sub(r"\]\(([^)#:\s]+)\)", link, markdown)


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
        return f"```yaml\n{(ROOT / 'recipes' / 'methods' / f'{name}.yaml').read_text('utf-8')}```"
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


def notebook_page(cells: list[dict[str, Any]], name: str) -> str:
    """Write the cells of a notebook and the text that they print as a page."""
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            shown = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            parts.append(f"```text\n{shown.rstrip()}\n```")
    title, rest = "\n\n".join(parts).split("\n", 1)
    return f"{title}\n\n[Download this notebook]({name}).\n{rest}\n"
