"""Convert GGUF files into safetensors folders, once per file.

Transformers takes tens of seconds to dequantise a GGUF file, and `save_pretrained` of the resulting model fails
("quantized with gguf"). The folder is therefore written from a config without quantisation and the state dict.
"""

import contextlib
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dwakd.errors import UserError
from dwakd.models.saving import save_causal_lm
from dwakd.paths import cache_folder

_CONVERSION = b"dwakd gguf conversion 1"


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file into a folder with float32 safetensors and a tokenizer, and return the folder.

    The folder is `<cache>/models/<stem>-<digest of the content>`. It is written on the first call and reused afterwards.
    It is renamed into place once complete, so several processes may convert the same file at the same time.

    Args:
        path: the GGUF file.

    Raises:
        UserError: the file does not exist, is not a GGUF file, lacks weights, or has an architecture or tokenizer that
            transformers cannot read; or the package gguf is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; gguf: requires the path of a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file (it does not begin with the bytes GGUF); give the path of a GGUF file"
            )
        digest = hashlib.sha256(_CONVERSION)
        file.seek(0)
        while block := file.read(1 << 22):
            digest.update(block)
    folder = cache_folder() / "models" / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _renamed_when_complete(folder) as unfinished:
            _convert(path, unfinished)
    return folder


@contextlib.contextmanager
def _renamed_when_complete(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` if the block succeeds and deleted otherwise."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has written the same content first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} requires the package gguf; install it with pip install 'dwakd[gguf]'")
    transformers_logging.get_logger(__name__).warning("converting %s to safetensors; later runs reuse the result", path)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, loading = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path} cannot be converted ({reason}); use a GGUF file of an architecture that transformers supports"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} weights of its architecture (first: {missing[0]}); use a complete GGUF file"
        )
    save_causal_lm(_unquantised(model), folder)
    tokenizer.save_pretrained(folder)


def _unquantised(model: Any) -> Any:
    """Return a model with the same weights whose config has no quantisation settings."""
    values = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        values.pop(name, None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
