"""GGUF files, converted once into a plain safetensors folder.

Dequantising a file through transformers takes tens of seconds and the model that results refuses
`save_pretrained` ("quantized with gguf"), so the folder is written from a clean config and the state dict.
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
    """The folder that holds the model and tokenizer of a GGUF file, in float32 safetensors.

    The folder is `<cache>/models/<stem>-<digest of the content>` and is made on the first call; it appears whole or
    not at all, also when several processes convert at once.

    Raises:
        UserError: no such file, not a GGUF file, the package gguf is not installed, an architecture or tokenizer that
            transformers cannot read, or weights missing in the file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; gguf: takes the path of a GGUF file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with the bytes GGUF).")
        digest = hashlib.sha256(_CONVERSION)
        file.seek(0)
        while block := file.read(1 << 22):
            digest.update(block)
    folder = cache_folder() / "models" / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _appearing_whole(folder) as unfinished:
            _convert(path, unfinished)
    return folder


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} cannot be read without the package gguf: install it by pip install 'dwakd[gguf]'")
    transformers_logging.get_logger(__name__).warning("Converting %s to safetensors (only this once).", path)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, loading = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path} cannot be converted ({reason}); see the GGUF models that transformers reads."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} weights of its architecture, the first is {missing[0]}.")
    save_causal_lm(_unquantised(model), folder)
    tokenizer.save_pretrained(folder)


def _unquantised(model: Any) -> Any:
    """The same weights in a model that does not think itself quantised."""
    values = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        values.pop(name, None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
