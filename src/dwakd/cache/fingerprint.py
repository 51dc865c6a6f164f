"""Digests of what a teacher cache was built from."""

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
from dwakd.errors import UserError, explained
from dwakd.models.loading import adapter_base, adapter_config
from dwakd.models.specs import only_cached, resolve_spec

_WEIGHTS = ("*.safetensors", "*.bin")
# Fields of a model's config that do not change its hidden states. The dtype is an option of the recipe.
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
DATE = "the date for chat templates"
"""Field of a fingerprint. The date is fixed when the cache is built; every run that reads the cache uses it again."""


def row_key(ids: Sequence[int] | NDArray[np.int32], num_prompt: int) -> bytes:
    """Compute the key of a row from what the teacher reads: its token ids and where the response begins."""
    content = np.asarray([num_prompt, *ids], dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def weights_digest(spec: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """Compute a SHA-256 of a model's weight files and config; for an adapter, also of those of its base model.

    The Hugging Face Hub lists the SHA-256 of its files, so they do not have to be downloaded.

    Raises:
        UserError: the model has no weight files.
    """
    settings = adapter_config(spec, revision)
    if settings is not None:
        base = weights_digest(adapter_base(settings, spec), trust_remote_code=trust_remote_code)
        return json_digest([adapter_digest(spec, revision=revision), base])
    location = resolve_spec(spec)
    options = {"revision": revision, "local_files_only": only_cached(location, revision)}
    config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **options).to_diff_dict()
    known = {name: value for name, value in config.items() if name not in _VOLATILE}
    return json_digest([_file_digests(spec, revision), known])


def adapter_digest(spec: str, *, revision: str | None = None) -> str:
    """Compute a SHA-256 of the weights and settings of an adapter, without its base model."""
    return json_digest([_file_digests(spec, revision), adapter_config(spec, revision)])


def fingerprint(
    encoder: TextEncoder,
    *,
    bos: str,
    max_length: int,
    teacher: str,
    adapter: str | None,
    dtype: str,
    quantization: Any = None,
) -> dict[str, str]:
    """Collect everything that must be equal for a cache to be usable, by option name.

    `teacher` is its `weights_digest`, `adapter` the `adapter_digest` of its adapter, `dtype` the type in which it computes
    and `quantization` its config or the options of it.
    """
    template = encoder.template
    if template == "chat":
        template = f"chat, by the tokenizer's template {json_digest(encoder.tokenizer.chat_template)[:16]}"
    if encoder.special_tokens_in_prompts != "parse":
        template += f", data.special_tokens_in_prompts: {encoder.special_tokens_in_prompts}"
    return {
        "teacher": teacher,
        "teacher.adapter": adapter or "none",
        "teacher.dtype": dtype if quantization is None else f"{dtype}, quantised with {quantization}",
        "tokenizer": tokenizer_digest(encoder),
        "data.template": template,
        "data.bos": bos,
        "data.max_length": str(max_length),
        **({} if encoder.date is None else {DATE: encoder.date}),
    }


def tokenizer_digest(encoder: TextEncoder) -> str:
    """Compute a SHA-256 of what a tokenizer does."""
    tokenizer = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    del tokenizer["padding"], tokenizer["truncation"]  # set by calls of the tokenizer
    return json_digest(tokenizer)


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digests(spec: str, revision: str | None) -> list[str]:
    """Return the sorted SHA-256 digests of a model's weight files."""
    location = resolve_spec(spec)
    folder = Path(location)
    if not folder.is_dir():
        fix = "check the network and start the command again"
        with explained(f"could not read the files of {spec} from the Hugging Face Hub; {fix}"):
            if not only_cached(location, revision):
                files = HfApi().model_info(location, revision=revision, files_metadata=True).siblings or []
                for pattern in _WEIGHTS:
                    if known := [item.lfs.sha256 for item in files if Path(item.rfilename).match(pattern) and item.lfs]:
                        return sorted(known)
            folder = Path(snapshot_download(location, revision=revision, local_files_only=True))
    for pattern in _WEIGHTS:
        if paths := list(folder.glob(pattern)):
            with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
                return sorted(pool.map(file_digest, paths))
    raise UserError(f"{spec} contains no weight files ({' or '.join(_WEIGHTS)}); correct the name of the model")


def json_digest(content: Any) -> str:
    """Compute the SHA-256 of a value written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
