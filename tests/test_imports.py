"""Test that every module can be imported first in a new interpreter."""

import subprocess
import sys

import pytest

_EACH_ALONE = """
import importlib, pkgutil, sys
import dwakd
names = [module.name for module in pkgutil.walk_packages(dwakd.__path__, "dwakd.") if not module.name.endswith("__main__")]
failed = []
for name in names:
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "dwakd"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception as error:
        if name.endswith("triton") and isinstance(error, ImportError):
            continue  # triton is published for Linux only
        failed.append(f"{name}: {type(error).__name__}: {error}")
print(len(names), *failed, sep="\\n")
"""


@pytest.mark.slow
def test_each_module_can_be_imported_alone():
    """Each module can be imported first. test_architecture.py looks for cycles of imports in less than a second."""
    done = subprocess.run([sys.executable, "-c", _EACH_ALONE], capture_output=True, text=True, check=True)
    count, *failed = done.stdout.splitlines()
    assert int(count) > 90
    assert not failed


def test_imports_point_one_way():
    """Importing `losses` or `kernels` does not load transformers, and `evaluation` does not load `losses`."""
    script = (
        "import sys, importlib; importlib.import_module(sys.argv[1]); "
        "sys.exit(any(name.split('.')[: len(bad)] == bad for name in sys.modules for bad in [sys.argv[2].split('.')]))"
    )
    for module, forbidden in (
        ("dwakd", "torch"),
        ("dwakd.cli", "torch"),
        ("dwakd.losses", "transformers"),
        ("dwakd.kernels", "transformers"),
        ("dwakd.evaluation.run", "dwakd.losses"),
    ):
        result = subprocess.run([sys.executable, "-c", script, module, forbidden], check=False, capture_output=True)
        assert result.returncode == 0, f"{module} imports {forbidden}: {result.stderr.decode()}"
