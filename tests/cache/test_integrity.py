"""A cache is verified before it is used, and refused with the reason if it is damaged or belongs to something else."""

import errno
import json
import os
import pickle
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
from dwakd.cache import store
from dwakd.cache.files import write_file
from dwakd.cache.index import Index
from dwakd.cache.manifest import FORMAT
from dwakd.cache.store import Cache, open_complete
from dwakd.training.cached import CachedTeacher
from tests.cache.builders import LONG, STUDENT, TEACHER, save_teacher, trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "gemma")


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher):
    """A complete cache. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    trainer(folder.parent / "run", teacher, cache=folder)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path / "cache"


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def repair(folder, teacher):
    """Do what `dwakd cache` does with a cache that exists."""
    run = trainer(folder.parent / "online", teacher)
    cached = CachedTeacher(folder, str(teacher))
    cached.prepare(run._encoders[1], run.args, {"train": run.train_dataset, "eval": None}, repair=True)


def test_files_are_safetensors_and_the_same_every_time(built, teacher, tmp_path):
    """Other programs must be able to read the files, and a shard that is built again must have the same bytes."""
    shards = sorted(built.glob("shard-*"))
    assert len(shards) >= 4
    for path in shards:
        assert load_file(path)["hidden"].shape[1] == 32
    trainer(tmp_path / "run", teacher, cache=tmp_path / "again")
    assert content(tmp_path / "again") == content(built)


@pytest.mark.parametrize("seconds", [0.0, 0.8])
def test_killed_at_any_moment_it_resumes(seconds, built, teacher, tmp_path):
    """After kill -9 every shard is complete. The next start builds only the shards that are missing."""
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
    """One wrong hidden state would give a wrong student without any error."""
    path = copied / name
    data = bytearray(path.read_bytes())
    place = at if isinstance(at, int) else int(at * len(data)) if at else data.index(b'"')
    data[place] ^= 1
    path.write_bytes(data)
    for refused in (
        lambda: trainer(tmp_path / "run", teacher, cache=copied),
        lambda: open_complete(copied),
    ):
        with pytest.raises(UserError, match=re.escape(name)):
            refused()


@pytest.mark.parametrize("name", ["index.safetensors", "shard-00002.safetensors"])
def test_every_byte_of_a_header_is_verified(name, copied):
    """A changed name, shape or offset in a header would read other numbers as hidden states."""
    path, cache = copied / name, Cache.open(copied)
    data = path.read_bytes()
    for place in range(8 + int.from_bytes(data[:8], "little")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if name.startswith("shard"):
            assert list(cache.problems()) == [name], place
        else:
            with pytest.raises(UserError, match=r"index\.safetensors of teacher cache .* is damaged"):
                Cache.open(copied)


def test_every_byte_of_the_manifest_is_verified(copied):
    """A changed character of the fingerprint would accept another teacher, or refuse the right one."""
    path = copied / "cache.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"cache\.json of teacher cache"):
            Cache.open(copied)


@pytest.mark.parametrize("content", [{}, {"identity": "0", "index": "0"}], ids=["same fields", "other fields"])
def test_a_cache_of_another_format(content, copied):
    """Reported as damaged, it would be built again next to good shards."""
    path = copied / "cache.json"
    path.write_text(json.dumps({**(content or json.loads(path.read_text())), "format": "dwakd teacher cache 2"}))
    with pytest.raises(
        UserError, match=r"format 'dwakd teacher cache 2', .* delete the folder, or name another"
    ) as error:
        open_complete(copied)
    assert FORMAT in str(error.value)


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "teacher.safetensors", "index.safetensors", "cache.json"])
@pytest.mark.parametrize("change", ["cut short", "extended", "empty"])
def test_a_file_of_another_length(change, name, copied, teacher, tmp_path):
    """An interrupted copy of a cache leaves such files."""
    path = copied / name
    data = path.read_bytes()
    path.write_bytes({"cut short": data[:-7], "extended": data + b"\0", "empty": b""}[change])
    with pytest.raises(UserError, match=re.escape(name)):
        open_complete(copied)
    if change == "cut short":
        with pytest.raises(UserError, match=re.escape(name)):
            trainer(tmp_path / "run", teacher, cache=copied)


@pytest.mark.parametrize("name", ["index.safetensors", "teacher.safetensors", "cache.json"])
def test_repair_keeps_finished_shards(name, copied, built, teacher):
    """The shards are what takes hours to build. A damaged small file must not cost them."""
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


def test_shards_that_changed_places(copied):
    """Both are complete files of this cache, but each row would be read from the wrong shard."""
    first, second = (copied / f"shard-{n:05}.safetensors" for n in (1, 2))
    for one, other in ((first, second), (second, first)):
        shutil.copy(one, tmp := copied / f"{other.name}.new")
        assert tmp.is_file()
    for path in (first, second):
        path.with_name(f"{path.name}.new").replace(path)
    assert list(Cache.open(copied).problems()) == [first.name, second.name]


def test_a_damaged_a_missing_and_a_foreign_shard(copied, built, teacher, tmp_path):
    """Each is named. `dwakd cache` builds damaged and missing shards again; training builds missing shards only."""
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
        r"row 5 \(counting from 0\) of d\.jsonl has changed .*only this row",
    ),
    "response": ({"rows": changed("response", "Other")}, r"row 5 \(counting from 0\) of d\.jsonl has changed"),
    "new row": ({"rows": [*LONG, LONG[0] | {"response": "New"}]}, r"row 16 .* did not exist when the cache was built"),
    "eval set": ({"eval_rows": [LONG[0] | {"response": "New"}]}, r"built without the eval set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_of_something_else(name, built, teacher, tmp_path):
    """Without the name of what differs, the user has to compare two recipes and two data files."""
    options, message = REFUSED[name]
    before = content(built)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", teacher, cache=built, dataset_names={"train": "d.jsonl"}, **options)
    assert content(built) == before


def test_another_teacher_adapter_dtype_and_tokenizer(built, teacher, tmp_path):
    """Weights are compared by content: a copy in another folder is accepted, one changed number is refused."""
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
    with pytest.raises(UserError, match=r"the content of the tokenizer .* has changed"):
        CachedTeacher(built, str(teacher)).prepare(run._encoders[0], run.args, sets)


def test_part_of_the_rows_in_another_order_is_served(built, teacher, tmp_path, monkeypatch):
    """Rows are found by their content, so a short run on some of the rows can use the same cache."""

    def loaded(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd.training.cached.load_causal_lm", loaded)
    run = trainer(tmp_path / "run", teacher, cache=built, rows=LONG[9:2:-1], eval_rows=LONG[12:14])
    run.train()


def test_an_unfinished_cache_and_other_data(copied, teacher, tmp_path):
    """A shard can only be built if all of its rows are in the data."""
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="is incomplete and 12 of its rows are not in this data"):
        trainer(tmp_path / "run", teacher, cache=copied, rows=LONG[:4])


def test_a_full_disk(built, teacher, tmp_path, monkeypatch):
    """Finished shards are kept, and the next start continues after them."""
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


def test_folders_that_are_no_cache(teacher, tmp_path):
    """A mistyped folder must not be written to."""
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
    """A position that two rows share, or that no row has, would give a row the hidden states of another one."""
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
        assert index.members["train"].tolist() == list(range(17))
        assert index.members["eval"].tolist() == [0, 1]
    assert STUDENT.get_vocab() != TEACHER.get_vocab()


def test_a_cache_survives_pickling(built):
    """Data-loader workers that are not forked receive a pickled copy."""
    cache = Cache.open(built)
    before = cache.read([3, 1])
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read([3, 1]), before)
