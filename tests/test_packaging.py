"""The package metadata agrees with the source."""

import ast
import re
import subprocess
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


WITHOUT_EXTRAS = """
import sys

sys.modules |= dict.fromkeys(BLOCKED)  # None: the package is not found
from dwakd.cli import app

for arguments in COMMANDS:
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


def test_the_commands_run_without_extras(workspace, tmp_path):
    """Users who install `dwakd` alone can train, evaluate and inspect in the terminal. CI installs all extras."""
    extras = PROJECT["optional-dependencies"]
    names = {re.split(r"[^\w-]", name)[0] for extra in ("gguf", "openai", "report") for name in extras[extra]}
    blocked = {IMPORTED_AS.get(name, name) for name in names}
    recipe, run = str(workspace / "recipe.yaml"), str(tmp_path / "run")
    commands = [
        ["train", recipe, "-o", run, "training.report_to=[]"],
        ["eval", run, "--data", str(workspace / "data.jsonl"), "--limit", "2", "--max-new-tokens", "2"],
        ["inspect", run],
    ]
    script = f"BLOCKED = {blocked!r}\nCOMMANDS = {commands!r}\n{WITHOUT_EXTRAS}"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
