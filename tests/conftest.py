"""Set the environment of all tests before any test module is imported."""

import os
import tempfile

import pytest

# Triton's interpreter runs its kernels on a CPU; Triton reads this once, when it is first imported
os.environ.setdefault("TRITON_INTERPRET", "1")

_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _CACHE.name  # of `datasets`, and of encoded rows


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Return a folder with two tiny models, rows and a recipe, which no test may change."""
    from tests.command_line import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))
