"""Test the messages of failures that no option causes: a full disk and an interrupted download."""

import errno
import os
import sys

import pytest

from dwakd.cache import fingerprint
from dwakd.errors import UserError
from dwakd.folders import write_json
from tests.command_line import one_sentence, run


def test_a_full_disk_is_named_by_every_command(tmp_path, monkeypatch, capsys):
    """Without the file and the fix, a user would see a traceback of any of the places that write files."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys.modules["dwakd.cli.app"], "app", lambda **_: write_json(tmp_path / "comparison.json", {}))
    code, _, err = run(monkeypatch, capsys)
    expected = (
        f"error: no space is left on the disk ({tmp_path / 'comparison.json'}): free some space and start the command"
    )
    assert (code, one_sentence(err)[: len(expected)]) == (2, expected)
    assert list(tmp_path.iterdir()) == [], "nothing that a later command could take as complete"


def test_a_path_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, capsys):
    """A name that is too long, or a file without read permission, raises an OSError, which must not end in a traceback."""
    code, _, err = run(monkeypatch, capsys, "train", "x" * 300)
    assert (code, one_sentence(err)) == (2, f"error: {'x' * 300} cannot be used: File name too long")


@pytest.mark.parametrize("broken", ["HfApi.model_info", "snapshot_download"])
def test_an_interrupted_download_is_explained(broken, monkeypatch):
    """The digest of a teacher asks the hub for its files after the model is loaded, when the network may be gone."""

    def interrupted(*args, **kwargs):
        raise ConnectionError("peer closed connection without sending complete message body")

    monkeypatch.setattr(fingerprint, "only_cached", lambda *_: broken == "snapshot_download")
    monkeypatch.setattr(f"dwakd.cache.fingerprint.{broken}", interrupted)
    with pytest.raises(
        UserError, match=r"files of owner/name from the Hugging Face Hub; check the network .*peer closed"
    ):
        fingerprint._file_digests("owner/name", None)
