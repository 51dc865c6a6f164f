"""Test that a cache is verified before it is used and refused, with the reason, if it does not fit."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dwakd import UserError
from dwakd.cache.store import Cache, open_complete
from dwakd.training.teacher import CachedTeacher
from tests.cache.builders import LONG, content, save_teacher, trainer


def test_files_are_safetensors_and_the_same_every_time(built, teacher, tmp_path):
    """Shards are safetensors files, and building a shard again gives the same bytes."""
    shards = sorted(built.glob("shard-*"))
    assert len(shards) >= 4
    for path in shards:
        assert load_file(path)["hidden"].shape[1] == 32
    trainer(tmp_path / "run", teacher, cache=tmp_path / "again")
    assert content(tmp_path / "again") == content(built)


@pytest.mark.parametrize("at", [3, 0.0, 0.4, 0.999])
@pytest.mark.parametrize("name", ["shard-00002.safetensors", "teacher.safetensors", "index.safetensors", "cache.json"])
def test_one_flipped_byte(name, at, copied, teacher, tmp_path):
    """A change of one byte is found in any file."""
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
    """A change of any byte in the header of a file is found."""
    path, cache = copied / name, Cache.open(copied)
    data = path.read_bytes()
    for place in range(8 + int.from_bytes(data[:8], "little")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if name.startswith("shard"):
            assert list(cache.problems()) == [name], place
        else:
            with pytest.raises(UserError, match=r"index\.safetensors of teacher cache .* is damaged"):
                Cache.open(copied)


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "teacher.safetensors", "index.safetensors", "cache.json"])
@pytest.mark.parametrize("change", ["cut short", "extended", "empty"])
def test_a_file_of_another_length(change, name, copied, teacher, tmp_path):
    """A file that is truncated or too long, as after an interrupted copy, is found."""
    path = copied / name
    data = path.read_bytes()
    path.write_bytes({"cut short": data[:-7], "extended": data + b"\0", "empty": b""}[change])
    with pytest.raises(UserError, match=re.escape(name)):
        open_complete(copied)
    if change == "cut short":
        with pytest.raises(UserError, match=re.escape(name)):
            trainer(tmp_path / "run", teacher, cache=copied)


def test_shards_that_changed_places(copied):
    """Two shards with exchanged names are found, although both files are complete."""
    first, second = (copied / f"shard-{n:05}.safetensors" for n in (1, 2))
    for one, other in ((first, second), (second, first)):
        shutil.copy(one, tmp := copied / f"{other.name}.new")
        assert tmp.is_file()
    for path in (first, second):
        path.with_name(f"{path.name}.new").replace(path)
    assert list(Cache.open(copied).problems()) == [first.name, second.name]


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
def test_a_cache_of_other_options_or_data_is_refused(name, built, teacher, tmp_path):
    """A cache that was built with other options or data is refused, and the message names the difference."""
    options, message = REFUSED[name]
    before = content(built)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", teacher, cache=built, dataset_names={"train": "d.jsonl"}, **options)
    assert content(built) == before


def test_another_teacher_adapter_dtype_and_tokenizer(built, teacher, tmp_path):
    """Teachers are compared by content: a copy in another folder is accepted, changed weights or settings are refused."""
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
        CachedTeacher(built, str(teacher), dtype=torch.bfloat16).prepare(run.encoders[1], run.args, sets)
    with pytest.raises(UserError, match=r"the content of the tokenizer .* has changed"):
        CachedTeacher(built, str(teacher)).prepare(run.encoders[0], run.args, sets)


def test_some_rows_in_another_order_can_be_read(built, teacher, tmp_path, monkeypatch):
    """A cache can be used for some of its rows in any order."""

    def loaded(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("dwakd.training.teacher.load_causal_lm", loaded)
    run = trainer(tmp_path / "run", teacher, cache=built, rows=LONG[9:2:-1], eval_rows=LONG[12:14])
    run.train()


def test_a_cache_survives_pickling(built):
    """A pickled cache, which data-loader workers receive, can be read."""
    cache = Cache.open(built)
    before = cache.read([3, 1])
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read([3, 1]), before)
