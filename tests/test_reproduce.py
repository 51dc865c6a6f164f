"""The commands of docs/reproduce.md are valid, although the tests cannot run them."""

import re
import shlex
from pathlib import Path

import typer
from benchmarks.paper import TABLES, option_parser

from dwakd.cli import app
from dwakd.compare.plan import variants_of
from dwakd.recipe.recipe import load_recipe
from dwakd.recipe.sections import CompareSection

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_commands_are_accepted() -> None:
    """A user pays for a GPU by the hour before a misspelt option shows."""
    commands = typer.main.get_command(app)
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        if program == "dwakd":
            name, *given = arguments
            commands.commands[name].make_context(name, [*given])  # type: ignore[attr-defined]
            if given[0].endswith(".yaml"):
                overrides = [option for option in given if "=" in option]
                recipe = load_recipe(ROOT / given[0], overrides, "compare" if name == "compare" else "train")
                for variant in variants_of(recipe, recipe.compare or CompareSection(), ablation=False):
                    variant.recipe(recipe)
        else:
            assert [program, *arguments[:2]] == ["python", "-m", "benchmarks.paper"]
            chosen = option_parser().parse_args(arguments[2:])
            assert chosen.row is None or chosen.row in TABLES[chosen.table]
    assert len(COMMANDS) == 10


def test_published_averages() -> None:
    """The page and the script must compare with the same numbers."""
    averages = sorted(row["mean"] for row in TABLES["qwen1.5-1.8b-gpt2-120m"].values())
    found = re.findall(r"^\| [\w -]+ \| (\d\d\.\d\d) \|$", PAGE, re.M)
    assert sorted(map(float, found)) == averages
