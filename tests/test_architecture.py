"""Test that modules import lower layers only and that there are no import cycles."""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

LAYERS = (
    ("errors", "folders", "checksums", "trl_names", "validation", "batch", "environment"),
    ("align", "kernels"),
    ("losses",),
    ("recipe", "data"),
    ("models", "cache"),
    ("evaluation",),
    ("answers",),
    ("training",),
    ("compare", "inspection", "judge", "report", "tools", "describe"),
    ("cli", "__init__", "__main__"),
)
"""The order of docs/architecture.md, lower layers first; parts of one layer may import each other."""

Edge = tuple[str, str]


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module by its dotted name. Names of packages end in __init__."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a module except those within functions: those that run, or that mypy checks, on import."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from module_level(node)


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """Yield the modules of dwakd that an import statement in module `name` imports, without parent packages."""
    if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join([*(name.split(".")[: -node.level] if node.level else []), *filter(None, [node.module])])
        targets = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return
    for target in targets:
        while target.split(".")[0] == "dwakd":
            if found := next((known for known in (target, f"{target}.__init__") if known in modules()), None):
                yield found
                break
            target = target.rpartition(".")[0]


def named(node: ast.AST) -> list[str]:
    """Return the modules of any package that an import statement names. Relative imports are not used."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def edges(*, only_module_level: bool) -> set[Edge]:
    """Return pairs of a module and a module that it imports."""
    walk = module_level if only_module_level else ast.walk
    return {
        (name, target)
        for name, tree in modules().items()
        for node in walk(tree)
        for target in imported(name, node)
        if target != name
    }


def packages(name: str) -> list[str]:
    """Return the packages that Python imports before a module."""
    parts = name.removesuffix(".__init__").split(".")
    return [".".join([*parts[:count], "__init__"]) for count in range(1, len(parts))]


def layer(name: str) -> int:
    part = name.split(".")[1]
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def cycle_in(graph: set[Edge]) -> list[str]:
    """Return the modules of one cycle with the first one repeated at the end, or an empty list."""
    targets: dict[str, list[str]] = {}
    for source, target in sorted(graph):
        targets.setdefault(source, []).append(target)
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in finished:
            for target in targets.get(name, []):
                if found := visit(target, [*path, name]):
                    return found
            finished.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in targets)), [])


@pytest.mark.parametrize("part", sorted({name.split(".")[1] for name in modules()}))
def test_every_part_has_a_layer(part: str) -> None:
    """Every package belongs to exactly one layer."""
    assert sum(part in parts for parts in LAYERS) == 1


def test_imports_point_to_lower_layers() -> None:
    """Modules import their own layer and lower layers only."""
    upward = {(source, target) for source, target in edges(only_module_level=False) if layer(target) > layer(source)}
    assert upward == set()


def test_there_are_no_cycles() -> None:
    """There are no import cycles, imports for type checking included, so that each module can be imported first.

    An import of a module of another package begins with this package, whose imports may lead back.
    """
    graph = edges(only_module_level=True)
    parents = {
        (source, package)
        for source, target in graph
        for package in packages(target)
        if package != source and package not in packages(source)
    }
    assert cycle_in(graph | parents) == []


@pytest.mark.parametrize(
    ("part", "forbidden"), [("evaluation", "dwakd.losses"), ("losses", "transformers"), ("kernels", "transformers")]
)
def test_packages_that_stay_independent(part: str, forbidden: str) -> None:
    """`evaluation` does not import `losses`, and `losses` and `kernels` do not import transformers."""
    roots = forbidden, f"{forbidden}."
    users = {
        name
        for name, tree in modules().items()
        if name.startswith(f"dwakd.{part}.")
        for node in ast.walk(tree)
        for target in named(node)
        if target == roots[0] or target.startswith(roots[1])
    }
    assert users == set()


def test_only_the_command_line_imports_the_applications() -> None:
    """Only the command line imports the applications shrink, similarity and demo."""
    users = {
        source
        for source, target in edges(only_module_level=False)
        if target.startswith("dwakd.tools.") and not source.startswith("dwakd.tools.")
    }
    assert {user.rpartition(".")[0] for user in users} == {"dwakd.cli"}


def test_a_cycle_is_found() -> None:
    """The search for cycles finds a cycle."""
    chain = {("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")}
    assert cycle_in(chain) == []
    found = cycle_in(chain | {("d", "b")})
    assert found[0] == found[-1]
    assert set(pairwise(found)) == {("b", "c"), ("c", "d"), ("d", "b")}
