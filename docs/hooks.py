"""Hooks of mkdocs: notebooks as pages, and links to the repository."""

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from dwakd.losses import METHODS

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
    """Link files outside docs/ to the repository, and notebooks to their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, found[1]))
        target = ROOT / path
        if path.startswith("docs/") and not target.is_dir():
            return found[0] if folder == "notebooks" else found[0].replace(".ipynb", ".md")
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        return f"]({config.extra['repository']}/{'tree' if target.is_dir() else 'blob'}/main/{path})"

    return re.sub(r"\]\(([^)#:\s]+)\)", link, markdown)


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
