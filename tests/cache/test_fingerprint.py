"""Test that a teacher is identified by its content, not by its name or folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from dwakd import UserError
from dwakd.cache import fingerprint
from dwakd.cache.fingerprint import adapter_digest, row_key, weights_digest
from tests.builders import byte_bpe, tiny_model
from tests.cache.builders import save_teacher


def test_the_hub_and_a_folder_give_the_same_digest(tmp_path, monkeypatch):
    """A teacher on the hub and its downloaded copy have the same digest."""
    folder = save_teacher(tmp_path / "teacher")
    digest = fingerprint.file_digest(folder / "model.safetensors")
    listed = [SimpleNamespace(rfilename="model.safetensors", lfs=SimpleNamespace(sha256=digest))]
    listed += [SimpleNamespace(rfilename="config.json", lfs=None)]
    hub = SimpleNamespace(model_info=lambda *args, **kwargs: SimpleNamespace(siblings=listed))
    monkeypatch.setattr(fingerprint, "HfApi", lambda: hub)
    monkeypatch.setattr(fingerprint, "only_cached", lambda *args: False)
    assert adapter_digest("owner/name") == adapter_digest(str(folder))
    monkeypatch.setattr(fingerprint, "only_cached", lambda *args: True)
    monkeypatch.setattr(fingerprint, "snapshot_download", lambda *args, **kwargs: str(folder))
    assert adapter_digest("owner/name") == adapter_digest(str(folder))


def test_digests_of_an_adapter_with_and_without_its_base(tmp_path):
    """The digest of an adapter that is the teacher includes its base model; that of an additional adapter does not."""
    base = save_teacher(tmp_path / "base", "llama")
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    spec = str(tmp_path / "adapter")
    before, alone = weights_digest(spec), adapter_digest(spec)
    save_teacher(tmp_path / "base", "llama", seed=7)
    assert weights_digest(spec) != before
    assert adapter_digest(spec) == alone


def test_rows_and_folders(tmp_path):
    """Rows that differ only in where the response begins have different keys, and a folder without weights is refused."""
    assert row_key([5, 6, 7], 1) != row_key([5, 6, 7], 2)
    assert row_key([5, 6, 7], 1) == row_key([5, 6, 7], 1)
    folder = Path(tmp_path / "empty")
    tiny_model("llama").config.save_pretrained(folder)
    byte_bpe().save_pretrained(folder)
    with pytest.raises(UserError, match="contains no weight files"):
        weights_digest(str(folder))
