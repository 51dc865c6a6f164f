"""The package metadata agrees with the source."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"pyyaml": "yaml", "vl-convert-python": "vl_convert", "pillow": "PIL"}
INSTALLED_BY_USERS = {"triton", "deepspeed", "vllm"}
"""Imported only where a user has chosen them; builds of torch that can use triton contain it."""


def imported_packages():
    """Return the top-level packages that modules under src import."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dwakd"}


def test_imports_and_dependencies_agree():
    """Every imported package is a declared dependency. A package that only another one installs may be missing later."""
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *extras["openai"], *extras["report"]]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}
    declared = {IMPORTED_AS.get(name, name).replace("-", "_") for name in names}
    assert imported_packages() - INSTALLED_BY_USERS == declared


def test_a_citation_names_the_package_s_repository():
    """The citation and the package metadata name the same repository."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"repository-code: {PROJECT['urls']['Homepage']}\n" in citation
