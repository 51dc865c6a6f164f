"""Find the model that a spec names.

A *spec* is one of

    HuggingFaceTB/SmolLM2-135M         a model on the Hugging Face Hub
    runs/student, ./student            a folder with a model or a PEFT adapter
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
    """Return the folder or hub id of a spec. A GGUF file is converted into a folder on first use.

    Raises:
        UserError: the spec names nothing that exists. Whether a hub id exists is not checked here.
    """
    if spec.startswith("package:"):
        path = _package_file(spec)
        return str(path) if path.is_dir() else str(convert_gguf(path))
    if spec.startswith("gguf:"):
        return str(convert_gguf(Path(spec.removeprefix("gguf:")).expanduser()))
    if not spec.strip():
        raise UserError("the name of a model is empty; give a folder, a hub id, gguf:PATH or package:NAME/FILE")
    path = Path(spec).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        fix = f"write gguf:{spec}" if path.suffix == ".gguf" else "give the folder of the model"
        raise UserError(f"{spec} is a file, but a model is a folder; {fix}")
    if _looks_local(spec):
        raise UserError(
            f"{spec} does not exist; give a folder, a hub id such as owner/name, gguf:PATH or package:NAME/FILE"
        )
    return spec


def _looks_local(spec: str) -> bool:
    """Return whether a spec is a path. A hub id is `name` or `owner/name`, where `owner` is not an existing folder."""
    parts = spec.split("/")
    if spec.startswith((".", "~")) or "\\" in spec or len(parts) > 2 or "" in parts:
        return True
    return len(parts) == 2 and Path(parts[0]).is_dir()


def _package_file(spec: str) -> Path:
    name, _, inner = spec.removeprefix("package:").partition("/")
    if not name or not inner:
        raise UserError(f"{spec} is incomplete; write package:NAME/FILE")
    folders = _package_folders(name)
    if not folders:
        raise UserError(f"{spec}: package {name} is not installed; install it with pip, or correct the name")
    for folder in folders:
        path = folder / inner
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            return path
    held = sorted({str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.gguf")})
    fix = (
        f"give one of its GGUF files: {', '.join(held)}"
        if held
        else "it contains no GGUF files, so use another package"
    )
    raise UserError(f"{spec}: package {name} has no file {inner}; {fix}")


def _package_folders(name: str) -> list[Path]:
    """Find the folders of an installed package by its import name or distribution name, without importing it."""

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
    """Return whether a model must be read from the local cache of the hub, because the hub cannot be reached.

    One request without retries is sent for each location and revision. Transformers would wait a minute for every file.

    Args:
        location: folder or hub id. For a folder, no request is sent and the result is False.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: the model or revision does not exist on the hub, the model is gated, or a folder is given with a
            revision.
    """
    if Path(location).is_dir():
        if revision is not None:
            raise UserError(
                f"{location} is a folder, and folders have no revisions (got revision {revision}); remove the revision, or "
                "give the hub id of the model"
            )
        return False
    try:
        HfApi().model_info(location, revision=revision, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise UserError(
            f"{location} is gated on the Hugging Face Hub; request access there and log in with hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{location} has no revision {revision} on the Hugging Face Hub; correct the revision"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{location} is neither an existing folder nor a public model on the Hugging Face Hub; correct the name"
        ) from error
    except Exception:  # without a network the HTTP client may raise any exception
        return True
    return False
