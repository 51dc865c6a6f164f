"""Files appear complete or not at all."""

import errno
import os

import pytest

from dwakd.cache.files import remove_unfinished, write_file


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    """An incomplete file under its final name would be read as a complete one."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "shard"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("shard", b"old")]


def test_another_process_that_finished_first(tmp_path, monkeypatch):
    """Two runs that build the same cache at once: the first to finish removes the temporary file of the second."""
    path = tmp_path / "shard"

    def finished(descriptor):
        path.write_bytes(b"same")
        remove_unfinished(tmp_path)

    monkeypatch.setattr(os, "fsync", finished)
    write_file(path, b"same")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("shard", b"same")]
