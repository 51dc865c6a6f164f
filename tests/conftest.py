"""Set the environment of all tests before any test module is imported."""

import gc
import os
import tempfile

import pytest

# Threads of several test processes would wait for each other; OpenMP reads this once, when torch is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's interpreter runs its kernels on a CPU; Triton reads this once, when it is first imported
os.environ.setdefault("TRITON_INTERPRET", "1")

_CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = _CACHE.name  # of `datasets`, and of encoded rows


def pytest_collection_finish():
    """Exclude what is imported by now from garbage collection. Each training collects garbage at its start and its end."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let the end of the interpreter delete the imported objects; otherwise, triton reports that they leak."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Return a folder with two tiny models, rows and a recipe, which no test may change."""
    from tests.command_line import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))
