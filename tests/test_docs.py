"""Test that everything a reader can copy from the README and the documentation works, and that the site can be built."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import typer
from benchmarks.paper import TABLES, option_parser
from transformers import AutoModelForCausalLM

from dwakd.cli import app
from dwakd.compare.plan import variants_of
from dwakd.data.sources import load_examples
from dwakd.losses import METHODS
from dwakd.losses.divergences import DIVERGENCES
from dwakd.recipe.files import parse_yaml
from dwakd.recipe.recipe import load_recipe, recipe_from_dict
from dwakd.recipe.sections import CompareSection
from dwakd.training.run import training_config
from tests.builders import CHAT_TEMPLATE, byte_bpe, tiny_model, unigram_byte_fallback

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
HUB_ROWS = {"instruction": ["Say hello.", "Add."], "context": ["", "1 and 2"], "response": ["Hello.", "3"]}
RECIPE = """
student: {model: student}
teacher: {model: teacher}
data: {train: rows.jsonl, eval: dev.jsonl}
generate: {output: answers.jsonl}
"""
"""What the parts of recipes and the overrides of the pages are added to."""


def blocks(language: str) -> dict[str, str]:
    """Return the code blocks of all pages, by page and number; a block that is shown twice only once."""
    found = {}
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            found.setdefault(text, f"{page.relative_to(ROOT)}-{number}")
    return {name: text for text, name in found.items()}


def commands() -> list[str]:
    """Return all lines of the console blocks, with continued lines joined."""
    return [line for text in blocks("console").values() for line in text.replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Go to a folder in which local models stand for those of the hub, and return the names that blocks use."""
    monkeypatch.chdir(tmp_path)
    pair = ("llama", byte_bpe()), ("qwen2", unigram_byte_fallback())
    places = ["HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B-Instruct", "runs/recipe"]
    for place, (family, tokenizer) in zip(places, (*pair, pair[0]), strict=True):
        tiny_model(family, len(tokenizer)).save_pretrained(tmp_path / place)
        tokenizer.save_pretrained(tmp_path / place)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: datasets.Dataset.from_dict(HUB_ROWS))
    (student_family, student_tokenizer), (teacher_family, teacher_tokenizer) = pair
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        tokenizer.chat_template = CHAT_TEMPLATE
    return {
        "rows": [{"prompt": "Say hello.", "response": "Hello."}, {"prompt": "1 and 2?", "response": "3"}],
        "student": tiny_model(student_family, len(student_tokenizer)),
        "teacher": tiny_model(teacher_family, len(teacher_tokenizer)),
        "student_tokenizer": student_tokenizer,
        "teacher_tokenizer": teacher_tokenizer,
    }


# docs/generate.md is run by tests/answers/test_run.py, with a teacher that ends its answers
PYTHON = {name: text for name, text in blocks("python").items() if not name.startswith("docs/generate.md")}


@pytest.mark.parametrize("name", PYTHON)
def test_python_blocks_run(name, reader):
    """A reader who copies a block gets an exception."""
    exec(PYTHON[name], reader)
    if "loss_function" in reader:
        assert all(parameter.grad is not None for parameter in reader["student"].parameters())
    if name == "README.md-0":
        assert AutoModelForCausalLM.from_pretrained("student").config.model_type == "llama"


@pytest.mark.parametrize("text", blocks("yaml").values(), ids=blocks("yaml"))
def test_recipes_are_valid(text):
    """A recipe, or a part of one, has a misspelt option or a value that is not allowed."""
    recipe = parse_yaml(RECIPE)
    for section, options in parse_yaml(text).items():
        both = isinstance(options, dict) and isinstance(recipe.get(section), dict)
        recipe[section] = {**recipe[section], **options} if both else options
    read = recipe_from_dict(recipe, "compare")
    training_config(read, "unused")
    for variant in variants_of(read, read.compare or CompareSection(), ablation=False):
        variant.recipe(read)


@pytest.mark.parametrize("text", blocks("json").values(), ids=blocks("json"))
def test_rows_are_valid(text):
    """A row that is shown as an example is refused."""
    (example,) = load_examples([json.loads(text)], name="rows")
    assert example.response


def test_commands_are_accepted(tmp_path):
    """A user waits for an installation, or pays for a GPU, before a misspelt option shows."""
    programs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for line in commands():
        program, *words = shlex.split(line, comments=True) or ["#"]
        words = words[: words.index("and")] if "and" in words else words
        if program == "torchrun":
            assert [words[0], *words[2:4]] == ["--nproc-per-node", "-m", "dwakd"], line
            program, words = "dwakd", words[4:]
        if program == "accelerate":
            assert [*words[:2], *words[3:5]] == ["launch", "--config_file", "-m", "dwakd"], line
            assert (ROOT / words[2]).is_file(), line
            program, words = "dwakd", words[5:]
        if program == "dwakd":
            name, *given = words
            programs[name].make_context(name, [*given])
            if name in ("train", "cache", "generate", "compare") and given[0].endswith(".yaml"):
                path = ROOT / given[0] if (ROOT / given[0]).exists() else tmp_path / "recipe.yaml"
                overrides = [word for word in given if re.match(r"[\w.]+=", word)]
                recipe = load_recipe(path, overrides, name)
                for variant in variants_of(recipe, recipe.compare or CompareSection(), ablation=False):
                    variant.recipe(recipe)
        elif program == "make":
            assert re.search(rf"^{words[0]}( [\w-]+)*:", makefile, re.M), line
        elif words[:2] == ["-m", "benchmarks.paper"]:
            chosen = option_parser().parse_args(words[2:])
            assert chosen.row is None or chosen.row in TABLES[chosen.table]
        elif program == "pip":
            assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", line)))) <= set(extras), line
        else:
            assert program == "#" or words[0] == "-c", line


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_complete_page(method):
    """The page of a method lacks a part, or shows a result that is not in docs/results."""
    page = (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")
    headings = [name for name in re.findall(r"^## (.*)$", page, re.M) if not name.startswith(("How ", "The label"))]
    assert headings == [
        *("Formula", "Requirements", "Options", "Recipe", "Measured results"),
        "Differences from the paper and the published code",
    ]
    for part in ("formula", "requirements", "options", "recipe"):
        assert f"<!-- {part} -->" in page, part
    results = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("results/*.md"))
    known = [cells(row) for row in re.findall(r"^\|.*\|$", results, re.M)]
    measured = page[page.index("## Measured results") : page.index("## Differences")]
    for row in re.findall(r"^\| (?:[^|\n]*\|){2,}$", measured, re.M):
        found = cells(row)[1:]
        if re.search(r"\d", found[-1]):
            assert any(found == other[-len(found) :] for other in known), row


def test_generated_parts_are_those_of_the_code():
    """A page shows an option that does not exist any more: run `make format`."""
    filled = runpy.run_path(str(DOCS / "generated.py"))
    assert len(filled["PAGES"]) == len(METHODS) + 1
    for page in filled["PAGES"]:
        assert filled["filled"](page) == page.read_text(encoding="utf-8"), page
        assert len(re.findall(r"^<!-- /", page.read_text(encoding="utf-8"), re.M)) >= 4, page


def cells(row: str) -> list[str]:
    """Return the cells of a row of a table without emphasis and empty cells."""
    return [cell for cell in (cell.strip().replace("*", "") for cell in row.split("|")) if cell]


@pytest.mark.parametrize("page", ["README.md", "docs/methods/index.md"])
def test_tables_list_every_method(page):
    """A new method is missing in a table."""
    assert re.findall(r"^\| \[`(\w+)`\]", (ROOT / page).read_text(encoding="utf-8"), re.M) == list(METHODS)


def test_divergences_are_listed():
    """A new divergence is missing on the page of `kd`."""
    page = (DOCS / "methods" / "kd.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| [KLmw]", page, re.M)) >= set(DIVERGENCES)


def test_messages_are_those_of_the_package():
    """A reader searches for a message of an older version."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # adjacent strings are one
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`([^`]+)`[.,]", page, re.M)
    assert len(messages) > 20
    for message in messages:
        for part in filter(None, map(str.strip, message.split("..."))):
            assert part in source, message


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_site(page):
    """A link of a page that mkdocs does not check leads nowhere."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / target).exists(), target


def test_published_averages() -> None:
    """docs/reproduce.md and `benchmarks.paper` compare with different numbers."""
    averages = sorted(row["mean"] for row in TABLES["qwen1.5-1.8b-gpt2-120m"].values())
    found = re.findall(r"^\| [\w -]+ \| (\d\d\.\d\d) \|$", (DOCS / "reproduce.md").read_text(encoding="utf-8"), re.M)
    assert sorted(map(float, found)) == averages
    for page in DOCS.glob("methods/*.md"):
        for value in re.findall(r"average\s+ROUGE-L\s+of\s+([\d.]+)", page.read_text(encoding="utf-8")):
            assert float(value) in averages, page


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    """A link leads nowhere, or a page needs the network."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^"]+)', text), name
    for method, kind in METHODS.items():
        text = pages[f"methods/{method}/index.html"]
        for option in kind.options_type.model_fields:
            assert option == "method" or f"<code>{option}</code>" in text, (method, option)
    assert 'id="dwakd.losses.DwaKdLoss"' in pages["api/losses/index.html"]
    assert "<code>max_prompt_length</code>" in pages["recipe/index.html"]
    assert 'href="https://github.com/dwakd/dwakd/blob/main/CONTRIBUTING.md"' in pages["architecture/index.html"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """A cell of a notebook fails, or prints nothing where the stored notebook has a text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    shown = [bool(cell.get("outputs")) for cell in notebook.cells]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [[out.text for out in cell.get("outputs", []) if out.get("name") == "stdout"] for cell in notebook.cells]
    assert [bool(texts) for texts in printed] == shown
    assert path.stat().st_size < 30_000
    text = json.dumps(printed)
    assert "Lima" in text if path.stem.startswith("distil") else "gradient of the teacher: False" in text
