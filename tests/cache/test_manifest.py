"""Test that the manifest is verified, and that each row belongs to exactly one shard."""

import json

import pytest

from dwakd import UserError
from dwakd.cache.manifest import FORMAT, Index
from dwakd.cache.store import Cache, open_complete
from tests.cache.builders import LONG, STUDENT, TEACHER, trainer


def test_every_byte_of_the_manifest_is_verified(copied):
    """A change of any character of the manifest is found."""
    path = copied / "cache.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"cache\.json of teacher cache"):
            Cache.open(copied)


@pytest.mark.parametrize("content", [{}, {"identity": "0", "index": "0"}], ids=["same fields", "other fields"])
def test_a_cache_of_another_format(content, copied):
    """A cache of another format is refused as such, not as damaged."""
    path = copied / "cache.json"
    path.write_text(json.dumps({**(content or json.loads(path.read_text())), "format": "dwakd teacher cache 2"}))
    with pytest.raises(
        UserError, match=r"format 'dwakd teacher cache 2', .* delete the folder, or name another"
    ) as error:
        open_complete(copied)
    assert FORMAT in str(error.value)


def test_folders_that_are_no_cache(teacher, tmp_path):
    """A file, and a folder with other files, are refused."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty and not a teacher cache \(it contains thesis\.tex"):
        trainer(tmp_path / "run", teacher, cache=tmp_path / "mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        trainer(tmp_path / "run", teacher, cache=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="is not a teacher cache"):
        open_complete(tmp_path / "mine")


def test_the_plan(teacher, tmp_path, monkeypatch):
    """Each row has its own positions in one shard, equal rows are stored once, and no shard is empty."""
    run = trainer(tmp_path / "run", teacher, rows=[*LONG, LONG[2]], eval_rows=LONG[:2])
    sets = {"train": run.train_dataset, "eval": run.eval_dataset}
    for shard_bytes in (1, 1000, 5000, 1 << 30):
        monkeypatch.setattr("dwakd.cache.manifest.SHARD_BYTES", shard_bytes)
        index = Index.plan(sets, 128)
        assert len(index.keys) == len(LONG)
        for shard, length in enumerate(index.shard_lengths):
            rows = index.rows_of(shard)
            places = [p for r in rows for p in range(index.offsets[r], index.offsets[r] + index.lengths[r])]
            assert sorted(places) == list(range(length))
            assert rows
        assert index.members["train"].tolist() == list(range(17))
        assert index.members["eval"].tolist() == [0, 1]
    assert STUDENT.get_vocab() != TEACHER.get_vocab()
