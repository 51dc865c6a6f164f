"""Test that output folders are checked before hours of work and that files are written completely or not at all."""

import errno
import os
from pathlib import Path

import pytest

from dwakd.errors import UserError
from dwakd.folders import CACHE_VARIABLE, cache_folder, check_output_folder, write_file


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    """The cache folder can be set, because home folders of clusters are often too small for models."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "~/x")
    assert cache_folder() == Path.home() / "x"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder() == Path.home() / ".cache" / "dwakd"


def test_folders_that_cannot_hold_results_are_refused(tmp_path):
    """An output folder that cannot be used is refused before anything runs."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match=rf"{tmp_path}/file is a file.*--output"):
            check_output_folder(folder)
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for folder in (tmp_path / "link", tmp_path / "link" / "deeper"):
        with pytest.raises(UserError, match=rf"{tmp_path}/link is a link to a folder that does not exist.*--output"):
            check_output_folder(folder)
    check_output_folder(tmp_path / "new" / "folder", empty=True)
    assert not (tmp_path / "new").exists(), "a check creates nothing"
    check_output_folder(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        check_output_folder(tmp_path, empty=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_folders_that_cannot_be_written_are_refused():
    """A folder without write permission is refused. The test uses /proc, because root may write to any other folder."""
    with pytest.raises(UserError, match="/proc/foo/x cannot be written"):
        check_output_folder(Path("/proc/foo/x"))


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    """A failed write leaves the previous file unchanged, and no incomplete file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "shard"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("shard", b"old")]


def test_another_process_that_finished_first(tmp_path, monkeypatch):
    """If another process writes the same file first and removes the temporary file, no error is raised."""
    path = tmp_path / "shard"

    def finished(descriptor):
        path.write_bytes(b"same")
        next(tmp_path.glob(".shard*")).unlink()

    monkeypatch.setattr(os, "fsync", finished)
    write_file(path, b"same")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("shard", b"same")]
