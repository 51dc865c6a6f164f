"""Find the model that a spec names, and convert GGUF files into safetensors folders.

A *spec* is one of

    HuggingFaceTB/SmolLM2-135M         a model on the Hugging Face Hub
    runs/student, ./student            a folder with a model or a PEFT adapter
    gguf:PATH                          a GGUF file
    package:NAME/FILE                  a GGUF file (or folder) inside an installed package, which is not imported
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dwakd.errors import UserError, explained
from dwakd.folders import cache_folder
from dwakd.models.saving import save_causal_lm

_HUB_SECONDS = 10.0
_CONVERSION = b"dwakd gguf conversion 1"
_FIX = "give a folder, a hub id, gguf:PATH or package:NAME/FILE"


def resolve_spec(spec: str) -> str:
    """Return the folder or hub id of a spec. A GGUF file is converted into a folder on first use.

    Raises:
        UserError: the spec names nothing that exists. Whether a hub id exists is not checked here.
    """
    if spec.startswith("package:"):
        path = _package_file(spec)
        return str(path if path.is_dir() else convert_gguf(path))
    if spec.startswith("gguf:"):
        return str(convert_gguf(Path(spec.removeprefix("gguf:")).expanduser()))
    if not spec.strip():
        raise UserError(f"the name of a model is empty; {_FIX}")
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        fix = f"write gguf:{spec}" if path.suffix == ".gguf" else "give the folder of the model"
        raise UserError(f"{spec} is a file, but a model is a folder; {fix}")
    # a hub id is `name` or `owner/name`, where `owner` is not an existing folder
    parts = spec.split("/")
    looks_local = spec.startswith((".", "~")) or "\\" in spec or len(parts) > 2 or "" in parts
    if looks_local or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise UserError(f"{spec} does not exist; {_FIX}")
    return spec


def _package_file(spec: str) -> Path:
    """Find a file or folder of an installed package by its import name or distribution name, without importing it."""
    name, _, inner = spec.removeprefix("package:").partition("/")
    if not name or not inner:
        raise UserError(f"{spec} is incomplete; write package:NAME/FILE")

    def plain(distribution: str) -> str:
        return re.sub(r"[-_.]+", "-", distribution).lower()

    distributions = importlib.metadata.packages_distributions()
    imports = [package for package, owners in distributions.items() if plain(name) in map(plain, owners)]
    found = [importlib.util.find_spec(package) for package in ([name] if name.isidentifier() else []) + imports]
    folders = [Path(folder) for item in found if item for folder in item.submodule_search_locations or ()]
    if not folders:
        raise UserError(f"{spec}: package {name} is not installed; install it with pip, or correct the name")
    for folder in folders:
        path = folder / inner
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            return path
    held = sorted({str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")})
    raise UserError(f"{spec}: package {name} has no file {inner}; its GGUF files are: {', '.join(held) or 'none'}")


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file into a folder with float32 safetensors and a tokenizer, and return the folder.

    Transformers would take tens of seconds for each reading of the file. The folder is
    `<cache>/models/<stem>-<digest of the content>`. It is written on the first call and renamed into place once complete,
    so several processes may convert the same file at the same time.

    Raises:
        UserError: the file is not a GGUF file that transformers can read, or the package gguf is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; gguf: requires the path of a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file, which would begin with GGUF; give the path of a GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(_CONVERSION)).hexdigest()
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(path, unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has written the same content first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} requires the package gguf; install it with pip install 'dwakd[gguf]'")
    transformers_logging.get_logger(__name__).warning("converting %s to safetensors; later runs reuse the result", path)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with explained(f"{path} cannot be converted; use a GGUF file of an architecture that transformers supports"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, loading = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} weights (first: {missing[0]}); use a complete GGUF file")
    model.hf_quantizer = None  # transformers refuses to save a model with the settings of a quantisation
    for name in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    save_causal_lm(model, folder)
    tokenizer.save_pretrained(folder)


@functools.cache
def only_cached(location: str, revision: str | None) -> bool:
    """Return whether a hub id must be read from the local cache of the hub, because the hub cannot be reached.

    One request without retries is sent for each hub id and revision. Transformers would wait a minute for every file.

    Raises:
        UserError: the model or revision does not exist on the hub, the model is gated, or a folder has a revision.
    """
    if Path(location).is_dir():
        if revision is None:
            return False
        fix = "remove the revision or give a hub id"
        raise UserError(f"{location} is a folder, which has no revision {revision}; {fix}")
    try:
        HfApi().model_info(location, revision=revision, timeout=_HUB_SECONDS)
    except GatedRepoError:
        problem = "is gated on the Hugging Face Hub; request access there and log in with hf auth login"
    except RevisionNotFoundError:
        problem = f"has no revision {revision} on the Hugging Face Hub; correct the revision"
    except (RepositoryNotFoundError, HFValidationError):
        problem = "is neither an existing folder nor a public model on the Hugging Face Hub; correct the name"
    except Exception:  # without a network the HTTP client may raise any exception
        return True
    else:
        return False
    raise UserError(f"{location} {problem}")
