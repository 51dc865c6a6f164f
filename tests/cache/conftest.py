"""A teacher and its cache, built once for all tests of this folder."""

import shutil

import pytest

from tests.cache.builders import save_teacher, trainer


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "gemma")


@pytest.fixture(scope="session")
def built(tmp_path_factory, teacher):
    """A complete cache. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    trainer(folder.parent / "run", teacher, cache=folder)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path / "cache"
