"""Test that an interrupted build continues, damaged files are built again, and two processes share the work."""

import errno
import json
import shutil
import warnings
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from dwakd import UserError
from dwakd.cache import store
from dwakd.cache.store import open_complete
from dwakd.folders import write_file
from dwakd.training.teacher import CachedTeacher
from tests.cache.builders import LONG, content, repair, save_teacher, trainer
from tests.shards import kill_after_first_shard
from tests.training.builders import assert_same, weights
from tests.two_ranks import run_on_two_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seconds", [0.0, 0.8])
def test_killed_at_any_moment_it_resumes(seconds, built, teacher, tmp_path):
    """After a build was killed, every shard is complete, and the next build computes only the missing shards."""
    folder = tmp_path / "cache"
    kill_after_first_shard("tests.cache.slow_build", teacher, folder, shards=folder, seconds=seconds)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert 0 < len(finished) < len(list(built.glob("shard-*")))
    (folder / ".shard-00099.safetensors.tmp-1").write_bytes(b"half")
    trainer(tmp_path / "run", teacher, cache=folder)
    assert content(folder) == content(built)
    assert all((folder / name).stat().st_mtime_ns == at for name, at in finished.items())


def test_rows_of_a_file_are_read_without_warnings(built, teacher, tmp_path):
    """The rows of a file are mapped into memory, and torch warns at arrays that cannot be written to."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, LONG)))
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The given NumPy array is not writable")
            trainer(tmp_path / "run", teacher, cache=tmp_path / "cache", rows=str(data))
    finally:
        torch.set_warn_always(False)
    assert content(tmp_path / "cache").keys() == content(built).keys()


@pytest.mark.parametrize("name", ["index.safetensors", "teacher.safetensors", "cache.json"])
def test_repair_keeps_finished_shards(name, copied, built, teacher):
    """Repairing a small damaged file does not build finished shards again."""
    path = copied / name
    path.write_bytes(path.read_bytes()[:-1])
    if name != "teacher.safetensors":
        with pytest.raises(UserError, match=r"delete cache\.json and run dwakd cache"):
            repair(copied, teacher)
        (copied / "cache.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in copied.glob("shard-*")}
    repair(copied, teacher)
    assert content(copied) == content(built)
    assert {path.name: path.stat().st_mtime_ns for path in copied.glob("shard-*")} == times


def test_a_damaged_a_missing_and_a_foreign_shard(copied, built, teacher, tmp_path):
    """The error names each file. `dwakd cache` builds damaged and missing shards again; training builds missing shards only."""
    path = copied / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors .* cut short, .*; run dwakd cache"):
        trainer(tmp_path / "run", teacher, cache=copied)
    (copied / "shard-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00001.*; shard-00003\.safetensors is missing; run dwakd"):
        open_complete(copied)
    repair(copied, teacher)
    assert content(copied) == content(built)
    (copied / "shard-00000.safetensors").unlink()
    trainer(tmp_path / "run", teacher, cache=copied)
    assert content(copied) == content(built)
    other = save_teacher(tmp_path / "other", seed=9)
    trainer(tmp_path / "run", other, cache=tmp_path / "foreign")
    shutil.copy(tmp_path / "foreign" / path.name, path)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors .* belongs to another cache"):
        trainer(tmp_path / "run", teacher, cache=copied)
    (copied / "cache.json").unlink()
    repair(copied, teacher)
    assert content(copied) == content(built)


def test_an_unfinished_cache_and_other_data(copied, teacher, tmp_path):
    """An incomplete cache cannot be completed with data that lacks some of its rows."""
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="is incomplete and 12 of its rows are not in this data"):
        trainer(tmp_path / "run", teacher, cache=copied, rows=LONG[:4])


def test_a_full_disk(built, teacher, tmp_path, monkeypatch):
    """If the disk is full, finished shards are kept and the next build continues after them."""
    folder = tmp_path / "cache"

    def full(path, data):
        if path.name == "shard-00003.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, data)

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(UserError, match=r"No space left on device \(3 shards are written"):
        trainer(tmp_path / "run", teacher, cache=folder)
    monkeypatch.setattr(store, "write_file", write_file)
    assert len(list(folder.glob("shard-*"))) == 3
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 4))
    with pytest.raises(UserError, match=r"needs [\d.]+ kB more, but .* only 4 bytes free \(3 shards are written"):
        trainer(tmp_path / "run", teacher, cache=folder)
    monkeypatch.undo()
    trainer(tmp_path / "run", teacher, cache=folder)
    assert content(folder) == content(built)


def test_two_ranks_build_half_each(tmp_path):
    """Two ranks build each shard once, and none reads before all shards are written.

    With 13 rows, the ranks have different numbers of rows in the last step.
    """
    teacher = save_teacher(tmp_path / "teacher")
    run_on_two_ranks("tests.cache.rank", teacher, tmp_path)
    built = [list(map(int, (tmp_path / f"rank-{rank}.txt").read_text().split())) for rank in (0, 1)]
    one = trainer(tmp_path / "one", teacher, cache=tmp_path / "alone", rows=LONG[:13])
    count = one.teachers[0].cache.num_shards
    assert built == [list(range(0, count, 2)), list(range(1, count, 2))]
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    one.train()
    assert_same(load_file(tmp_path / "weights.safetensors"), weights(one), atol=2e-4)


@pytest.mark.slow
def test_three_ranks_build_and_two_read(tmp_path):
    """A cache does not depend on the number of ranks, and another number of ranks reads it without the teacher."""
    teacher = save_teacher(tmp_path / "teacher")
    run_on_two_ranks("tests.cache.rank", teacher, tmp_path, ranks=3)
    records = [tmp_path / f"rank-{rank}.txt" for rank in range(3)]
    built = [list(map(int, record.read_text().split())) for record in records]
    one = trainer(tmp_path / "one", teacher, cache=tmp_path / "alone", rows=LONG[:13])
    count = one.teachers[0].cache.num_shards
    assert built == [list(range(rank, count, 3)) for rank in range(3)]
    assert content(tmp_path / "cache") == content(tmp_path / "alone")
    for record in records:
        record.unlink()
    run_on_two_ranks("tests.cache.rank", teacher, tmp_path)
    assert not any(record.exists() for record in records), "nothing is built again"
    one.train()
    assert_same(load_file(tmp_path / "weights.safetensors"), weights(one), atol=2e-4)


def test_a_cache_at_an_address(built, teacher, tmp_path, monkeypatch):
    """Shards in an object store cannot be mapped into memory, so they are copied once, and damage is found as usual."""
    monkeypatch.setenv("DWAKD_CACHE", str(tmp_path / "copies"))
    store = fsspec.filesystem("memory")
    for path in built.iterdir():
        store.pipe(f"/bucket/cache/{path.name}", path.read_bytes())
    cached = CachedTeacher("memory://bucket/cache", str(teacher))
    assert content(cached.folder) == content(built)
    store.rm("/bucket/cache/shard-00001.safetensors")
    (cached.folder / "shard-00002.safetensors").unlink()
    again = CachedTeacher("memory://bucket/cache", str(teacher))
    assert content(again.folder) == content(built), "only what is missing is copied"
    online = trainer(tmp_path / "run", teacher)
    again.check(online.encoders[1], online.args, {"train": online.train_dataset, "eval": None})
    with pytest.raises(UserError, match=r"memory://bucket/none cannot be read; build it in a folder"):
        CachedTeacher("memory://bucket/none", str(teacher))
