"""A cache that is whole, that belongs, or that is refused with the reason."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dwakd import UserError
from dwakd.cache import files
from dwakd.cache.index import Index
from dwakd.cache.store import Cache, open_whole
from dwakd.training.cached import CachedTeacher
from tests.cache.builders import LONG, STUDENT, TEACHER, save_teacher, trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "gemma")


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher):
    """A whole cache; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    trainer(folder.parent / "run", teacher, cache=folder)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path / "cache"


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mend(folder, teacher):
    """What `dwakd cache` does to a cache that is there."""
    run = trainer(folder.parent / "online", teacher)
    cached = CachedTeacher(folder, str(teacher))
    cached.prepare(run._encoders[1], run.args, {"train": run.train_dataset, "eval": None}, mend=True)


def test_files_are_safetensors_and_the_same_every_time(built, teacher, tmp_path):
    """Another reader must be able to open them, and a rebuilt shard must be the shard."""
    shards = sorted(built.glob("shard-*"))
    assert len(shards) >= 4
    for path in shards:
        assert load_file(path)["hidden"].shape[1] == 32
    trainer(tmp_path / "run", teacher, cache=tmp_path / "again")
    assert content(tmp_path / "again") == content(built)


@pytest.mark.parametrize("seconds", [0.0, 0.8])
def test_killed_at_any_moment_it_resumes(seconds, built, teacher, tmp_path):
    """kill -9 leaves whole shards, and the next start builds the rest and nothing twice."""
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cache.slow_build", str(teacher), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob("shard-*")):
            assert process.poll() is None, "the build ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert 0 < len(finished) < len(list(built.glob("shard-*")))
    (folder / ".shard-00099.safetensors.tmp-1").write_bytes(b"half")
    trainer(tmp_path / "run", teacher, cache=folder)
    assert content(folder) == content(built)
    assert all((folder / name).stat().st_mtime_ns == at for name, at in finished.items())


@pytest.mark.parametrize("at", [3, 0.0, 0.4, 0.999])
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "teacher.safetensors", "index.safetensors", "cache.json"])
def test_one_flipped_byte(name, at, copied, teacher, tmp_path):
    """Training on hidden states of which one is wrong gives a student that is wrong, and nobody sees it."""
    path = copied / name
    data = bytearray(path.read_bytes())
    place = at if isinstance(at, int) else int(at * len(data)) if at else data.index(b'"')
    data[place] ^= 1
    path.write_bytes(data)
    for refused in (
        lambda: trainer(tmp_path / "run", teacher, cache=copied),
        lambda: open_whole(copied),
    ):
        with pytest.raises(UserError, match=re.escape(name)):
            refused()


def test_every_byte_of_the_index_counts(copied):
    """Its header too: a set of another name would be missing, and other places of the data no index at all."""
    path = copied / "index.safetensors"
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"index\.safetensors of teacher cache .* is damaged"):
            Cache.open(copied)


def test_a_cache_of_another_format(copied):
    """Read as this one, it would be called damaged, and built anew beside good shards."""
    path = copied / "cache.json"
    path.write_text(path.read_text().replace("dwakd teacher cache 2", "dwakd teacher cache 1"))
    with pytest.raises(
        UserError, match=r"has the format 'dwakd teacher cache 1', .* delete the folder, or name another"
    ):
        open_whole(copied)


def test_a_truncated_a_missing_and_a_foreign_shard(copied, built, teacher, tmp_path):
    """Each is named with what is wrong; what is damaged is built anew by `dwakd cache`, what is missing by training."""
    path = copied / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors of teacher cache .* \(cut short\); run dwakd cache"):
        trainer(tmp_path / "run", teacher, cache=copied)
    (copied / "shard-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00001.*cut short\); shard-00003\.safetensors is missing; run dwakd"):
        open_whole(copied)
    mend(copied, teacher)
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
    mend(copied, teacher)
    assert content(copied) == content(built)


def changed(field, value):
    rows = [dict(row) for row in LONG]
    rows[5][field] = value
    return rows


REFUSED = {
    "template": ({"template": "alpaca"}, r"data\.template is 'plain' in the cache and 'alpaca' here"),
    "bos": ({"bos": "never"}, r"data\.bos is 'auto' in the cache and 'never' here"),
    "truncation": ({"max_length": 300}, r"data\.max_length is '512' in the cache and '300' here"),
    "prompt": (
        {"rows": changed("prompt", "Another?")},
        r"row 5 \(counting from 0\) of d\.jsonl has changed .*that row",
    ),
    "response": ({"rows": changed("response", "Other")}, r"row 5 \(counting from 0\) of d\.jsonl has changed"),
    "new row": ({"rows": [*LONG, LONG[0] | {"response": "New"}]}, r"row 16 .* was not there when it was built"),
    "eval set": ({"eval_rows": [LONG[0] | {"response": "New"}]}, r"built without the eval set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_of_something_else(name, built, teacher, tmp_path):
    """The sentence names what differs: an hour of looking for it, otherwise."""
    options, message = REFUSED[name]
    before = content(built)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", teacher, cache=built, dataset_names={"train": "d.jsonl"}, **options)
    assert content(built) == before


def test_another_teacher_adapter_dtype_and_tokenizer(built, teacher, tmp_path):
    """Weights are known by their content: another folder with the same is the same, one changed number is another."""
    shutil.copytree(teacher, tmp_path / "same")
    trainer(tmp_path / "run", tmp_path / "same", cache=built)
    other = save_teacher(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"the teacher is .*gemma in the cache and .*other here, and their contents"):
        trainer(tmp_path / "run", other, cache=built)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    (tmp_path / "same" / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 3.0}))
    with pytest.raises(UserError, match="the teacher is"):
        trainer(tmp_path / "run", tmp_path / "same", cache=built)
    run = trainer(tmp_path / "run", teacher)
    sets = {"train": run.train_dataset, "eval": None}
    with pytest.raises(UserError, match=r"teacher\.dtype is 'float32' in the cache and 'bfloat16' here"):
        CachedTeacher(built, str(teacher), dtype=torch.bfloat16).prepare(run._encoders[1], run.args, sets)
    with pytest.raises(UserError, match=r"the tokenizer .* content has changed"):
        CachedTeacher(built, str(teacher)).prepare(run._encoders[0], run.args, sets)


def test_part_of_the_rows_in_another_order_is_served(built, teacher, tmp_path, monkeypatch):
    """Content identifies a row: a smoke run on some rows needs no cache of its own."""

    def loaded(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd.training.cached.load_causal_lm", loaded)
    run = trainer(tmp_path / "run", teacher, cache=built, rows=LONG[9:2:-1], eval_rows=LONG[12:14])
    run.train()


def test_an_unfinished_cache_and_other_data(copied, teacher, tmp_path):
    """A shard can only be built from all of its rows."""
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="is not whole and 12 of its rows are not in this data"):
        trainer(tmp_path / "run", teacher, cache=copied, rows=LONG[:4])


def test_a_full_disk(built, teacher, tmp_path, monkeypatch):
    """The shards that are there stay good, and the next start goes on from them."""
    write, folder = files.write_whole, tmp_path / "cache"

    def full(path, parts):
        if path.name == "shard-00003.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, parts)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(UserError, match=r"the disk is full; 3 of \d+ shards are finished and stay good"):
        trainer(tmp_path / "run", teacher, cache=folder)
    monkeypatch.setattr(files, "write_whole", write)
    assert len(list(folder.glob("shard-*"))) == 3
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 4))
    with pytest.raises(UserError, match=r"is too full: [\d.]+ kB are needed and 4 bytes are free \(3 of"):
        trainer(tmp_path / "run", teacher, cache=folder)
    monkeypatch.undo()
    trainer(tmp_path / "run", teacher, cache=folder)
    assert content(folder) == content(built)


def test_a_write_that_breaks_leaves_nothing(tmp_path):
    """Half a file under its own name would be read as a whole one."""

    def parts():
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        files.write_whole(tmp_path / "a", parts())
    assert content(tmp_path) == {"a": b"old"}


def test_folders_that_are_no_cache(teacher, tmp_path):
    """A mistyped folder must not be written into."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty and no teacher cache \(it holds thesis\.tex"):
        trainer(tmp_path / "run", teacher, cache=tmp_path / "mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        trainer(tmp_path / "run", teacher, cache=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="is no teacher cache"):
        open_whole(tmp_path / "mine")


def test_the_plan(teacher, tmp_path, monkeypatch):
    """Every position lies in one place of one shard; equal rows are stored once; a shard has the size it may have."""
    run = trainer(tmp_path / "run", teacher, rows=[*LONG, LONG[2]], eval_rows=LONG[:2])
    sets = {"train": run.train_dataset, "eval": run.eval_dataset}
    for shard_bytes in (1, 1000, 5000, 1 << 30):
        monkeypatch.setattr("dwakd.cache.index.SHARD_BYTES", shard_bytes)
        index = Index.plan(sets, 128)
        assert len(index.keys) == len(LONG)
        for shard, length in enumerate(index.shard_lengths):
            rows = index.rows_of(shard)
            places = [p for r in rows for p in range(index.offsets[r], index.offsets[r] + index.lengths[r])]
            assert sorted(places) == list(range(length))
            assert rows
        assert index.members["train"][:, 0].tolist() == list(range(17))
        assert index.members["eval"][:, 1].tolist() == [0, 1]
    assert STUDENT.get_vocab() != TEACHER.get_vocab()


def test_a_cache_survives_pickling(built):
    """Data-loader workers that are not forked get it so."""
    import pickle

    cache = Cache.open(built)
    before = cache.read([3, 1])
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read([3, 1]), before)
