"""What names a model, and where it is.

A *spec* is one of

    HuggingFaceTB/SmolLM2-135M         a model of the Hugging Face hub
    runs/student, ./student            a folder, also one with a PEFT adapter
    gguf:PATH                          a GGUF file
    package:NAME/FILE                  a GGUF file (or folder) inside an installed package, which is not imported
"""

import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from dwakd.errors import UserError
from dwakd.models.gguf import convert_gguf

_HUB_SECONDS = 10.0


def resolve_spec(spec: str) -> str:
    """The folder or hub id behind a spec; converts a GGUF file on first use."""
    if spec.startswith("package:"):
        path = _package_file(spec)
        return str(path) if path.is_dir() else str(convert_gguf(path))
    if spec.startswith("gguf:"):
        return str(convert_gguf(Path(spec.removeprefix("gguf:")).expanduser()))
    if not spec.strip():
        raise UserError("The name of a model is empty; give a folder, a hub id, gguf:PATH or package:NAME/FILE.")
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        mend = f"write gguf:{spec}" if path.suffix == ".gguf" else "give the model's folder"
        raise UserError(f"{spec} is a file and not a model's folder; {mend}.")
    if _looks_local(spec):
        raise UserError(
            f"{spec} does not exist; give a folder, a hub id such as owner/name, gguf:PATH or package:NAME/FILE."
        )
    return spec


def _looks_local(spec: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else, or an owner that is a folder here, means a path."""
    parts = spec.split("/")
    if spec.startswith((".", "~")) or "\\" in spec or len(parts) > 2 or "" in parts:
        return True
    return len(parts) == 2 and Path(parts[0]).is_dir()


def _package_file(spec: str) -> Path:
    name, _, inner = spec.removeprefix("package:").partition("/")
    if not name or not inner:
        raise UserError(f"{spec} is incomplete; write package:NAME/FILE.")
    folders = _package_folders(name)
    if not folders:
        raise UserError(f"{spec}: no package {name} is installed here; install it with pip, or correct the name.")
    for folder in folders:
        path = folder / inner
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            return path
    held = sorted({str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")})
    raise UserError(f"{spec}: the package {name} has no file {inner}; its GGUF files: {', '.join(held) or 'none'}.")


def _package_folders(name: str) -> list[Path]:
    """Folders of an installed package by import name or distribution name, without importing it."""

    def plain(text: str) -> str:
        return re.sub(r"[-_.]+", "-", text).lower()

    distributions = importlib.metadata.packages_distributions()
    imports = [package for package, owners in distributions.items() if plain(name) in map(plain, owners)]
    if name.isidentifier():
        imports.insert(0, name)
    folders: list[Path] = []
    for package in imports:
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations is not None:
            folders += [Path(folder) for folder in found.submodule_search_locations]
    return folders


@functools.cache
def only_cached(location: str, revision: str | None) -> bool:
    """True where the hub cannot be reached, so that only its local cache can serve; False for a folder.

    Asks once and without retries: transformers would wait a minute for every file.

    Raises:
        UserError: the hub knows no such model or revision, or guards it; or a revision of a folder.
    """
    if Path(location).is_dir():
        if revision is not None:
            raise UserError(
                f"{location} is a folder here, which has no revision {revision}; leave the revision out, or name the "
                "model by its hub id."
            )
        return False
    try:
        HfApi().model_info(location, revision=revision, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise UserError(f"{location} is gated on the Hugging Face hub; ask for access there and log in.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{location} has no revision {revision} on the Hugging Face hub; correct it.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{location} is neither a folder here nor a public model of the Hugging Face hub; correct the name."
        ) from error
    except Exception:  # whatever the HTTP client raises without a network
        return True
    return False
