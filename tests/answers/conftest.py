"""A folder with tiny models and prompts, and the answers to them, made once for all tests of this folder."""

import shutil

import pytest

from dwakd.answers import answer_recipe
from tests.answers.builders import changed, make_folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a folder and the content of its recipe; no test may change the folder."""
    folder = tmp_path_factory.mktemp("answers")
    return folder, make_folder(folder)


@pytest.fixture(scope="session")
def finished(models, tmp_path_factory):
    """Return the path of a complete answer file, which no test may change."""
    path = tmp_path_factory.mktemp("finished") / "answers.jsonl"
    answer_recipe(changed(models[1]), output=path)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    """Return the path of a copy of the complete answer file."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.name
