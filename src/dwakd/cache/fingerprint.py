"""What a teacher cache was built from, as digests, and the words for what differs."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from numpy.typing import NDArray
from transformers import AutoConfig

from dwakd.data.encoding import TextEncoder
from dwakd.errors import UserError
from dwakd.models.loading import adapter_base, adapter_config
from dwakd.models.specs import only_cached, resolve_spec

_BLOCK = 1 << 22
_WEIGHTS = ("*.safetensors", "*.bin")
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of a config that don't change a hidden state; the dtype is an option of the recipe."""
DATE = "the date for chat templates"
"""Field of a fingerprint: fixed when a cache is built, and used again by whoever reads it."""


def row_key(ids: Sequence[int] | NDArray[np.int32], num_prompt: int) -> bytes:
    """Identifies what the teacher reads of a row: its tokens, and where the response begins."""
    content = np.asarray([num_prompt, *ids], dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def weights_digest(spec: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """SHA-256 over the content of a model's weight files and its config; of an adapter also of its base model's.

    The hub knows its files by the same SHA-256, so that they need not be read, nor be here.

    Raises:
        UserError: there are no weights.
    """
    settings = adapter_config(spec, revision)
    if settings is not None:
        base = weights_digest(adapter_base(settings, spec), trust_remote_code=trust_remote_code)
        return _digest([adapter_digest(spec, revision=revision), base])
    location = resolve_spec(spec)
    local = only_cached(location, revision)
    config = AutoConfig.from_pretrained(
        location, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local
    ).to_diff_dict()
    known = {name: value for name, value in config.items() if name not in _VOLATILE}
    return _digest([sorted(_file_digests(location, spec, revision)), known])


def adapter_digest(spec: str, *, revision: str | None = None) -> str:
    """SHA-256 over the weights and settings of an adapter, without the model it belongs to."""
    location = resolve_spec(spec)
    return _digest([sorted(_file_digests(location, spec, revision)), adapter_config(spec, revision)])


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over everything that turns text into ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):  # set in passing by whoever calls the tokenizer
        state.pop(setting, None)
    return _digest(state)


def fingerprint(
    encoder: TextEncoder,
    *,
    bos: str,
    max_length: int,
    teacher: str,
    adapter: str | None,
    dtype: str,
) -> dict[str, str]:
    """What has to be equal for a cache to be of use, by the name to use in a message.

    Args:
        encoder: the teacher's.
        bos: option of the encoder.
        max_length: most tokens of a row.
        teacher: digest of the teacher's weights.
        adapter: digest of its adapter's.
        dtype: in which the teacher computes.
    """
    template = encoder.template
    if template == "chat":
        template = f"chat, by the tokenizer's template {_digest(encoder.tokenizer.chat_template)[:16]}"
    date = {} if encoder.date is None else {DATE: encoder.date}
    if encoder.special_tokens_in_prompts != "parse":
        template += f", data.special_tokens_in_prompts: {encoder.special_tokens_in_prompts}"
    return {
        "teacher": teacher,
        "teacher.adapter": adapter or "none",
        "teacher.dtype": dtype,
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "data.template": template,
        "data.bos": bos,
        "data.max_length": str(max_length),
        **date,
    }


def difference(there: dict[str, str], here: dict[str, str], names: tuple[dict[str, str], dict[str, str]]) -> str | None:
    """What differs first, as a clause; None if nothing does. `names` are those of teacher, adapter and tokenizer."""
    for field, value in here.items():
        if there.get(field) == value:
            continue
        if field not in names[0]:
            return f"{field} is {there.get(field)!r} in the cache and {value!r} here"
        old, new = names[0][field], names[1][field]
        if old == new:
            return f"the {field} {new} is not what it was when the cache was built: its content has changed"
        return f"the {field} is {old} in the cache and {new} here, and their contents differ"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _file_digests(location: str, spec: str, revision: str | None) -> list[str]:
    folder = Path(location)
    if not folder.is_dir():
        if not only_cached(location, revision):
            files = HfApi().model_info(location, revision=revision, files_metadata=True).siblings or []
            for pattern in _WEIGHTS:
                known = [item.lfs.sha256 for item in files if Path(item.rfilename).match(pattern) and item.lfs]
                if known:
                    return known
        folder = Path(snapshot_download(location, revision=revision, local_files_only=True))
    for pattern in _WEIGHTS:
        if paths := sorted(folder.glob(pattern)):
            with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
                return list(pool.map(file_digest, paths))
    raise UserError(f"{spec} holds no weights ({' or '.join(_WEIGHTS)}) to know it by")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
