"""Load models and tokenizers by a spec (`dwakd.models.specs`).

Remote code runs only if `trust_remote_code` is set. Pickle files are read only by transformers, with weights_only.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from dwakd.errors import UserError
from dwakd.models.adapters import merge_adapter
from dwakd.models.specs import only_cached, resolve_spec

_LOADING_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError),
    *(SafetensorError, UserWarning),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")


def load_tokenizer(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the tokenizer of a model.

    For a PEFT adapter without a tokenizer, the tokenizer of its base model is loaded. If the tokenizer has no pad token,
    its end-of-sequence token is used for padding.

    Args:
        spec: a folder, a hub id, gguf:PATH or package:NAME/FILE, see `dwakd.models.specs`.
        trust_remote_code: run the Python code of a hub repository. Set it only if you have read that code.
        revision: branch, tag or commit of a hub id.

    Returns:
        A fast tokenizer with an end-of-sequence and a pad token.

    Raises:
        UserError: the tokenizer cannot be loaded, has no fast version or has no end-of-sequence token.
    """
    location = resolve_spec(spec)
    if Path(location).is_dir() and not any((Path(location) / name).exists() for name in _TOKENIZER_FILES):
        adapter = _adapter_config(location, revision)
        if adapter is None:
            raise UserError(
                f"{spec} contains no tokenizer (no tokenizer.json); give the folder or hub id of the tokenizer"
            )
        return load_tokenizer(adapter_base(adapter, spec), trust_remote_code=trust_remote_code)
    local = only_cached(location, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, trust_remote_code=trust_remote_code, revision=revision, local_files_only=local
        )
    except _LOADING_ERRORS as error:
        raise _cannot_load("tokenizer", spec, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {spec} has no fast version, which is required for text offsets; use a tokenizer with a "
            "tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {spec} has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    spec: str,
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model in eval mode and merge its adapters into its weights.

    Args:
        spec: a folder, a hub id, gguf:PATH or package:NAME/FILE, see `dwakd.models.specs`. If it is a PEFT adapter, its
            base model is loaded and the adapter is merged.
        adapter: folder or hub id of a PEFT adapter to merge into the model of `spec`.
        dtype: dtype of the weights.
        trust_remote_code: run the Python code of a hub repository. Set it only if you have read that code.
        revision: branch, tag or commit of `spec` if that is a hub id. It does not apply to `adapter`.

    Raises:
        UserError: the model cannot be loaded, is not a causal language model or lacks weights.
    """
    location = resolve_spec(spec)
    own_adapter = _adapter_config(location, revision)
    if own_adapter is None:
        _refuse_named_adapters(location, spec)
        model = _pretrained(location, spec, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    else:
        base = adapter_base(own_adapter, spec)
        model = load_causal_lm(base, dtype=dtype, trust_remote_code=trust_remote_code)
        model = _merged(model, location, spec, revision)
    if adapter is not None:
        folder = resolve_spec(adapter)
        if _adapter_config(folder, None) is None:
            _refuse_named_adapters(folder, adapter)
            raise UserError(
                f"{adapter} is not a PEFT adapter (no adapter_config.json); give the folder or hub id of an adapter"
            )
        model = _merged(model, folder, adapter, None)
    return model.eval()


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer has more tokens than the model has embeddings.

    An embedding table that is larger than the tokenizer, as Qwen's, is accepted.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens but its model has only {rows} embeddings; use the "
            "tokenizer that belongs to the model"
        )


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """Copy the tokenizer's special tokens into the model's config and generation config.

    Generation would not stop at an end-of-sequence token that these lack. The end-of-sequence token is added to those of
    the generation config. Beginning-of-sequence and pad token are replaced.
    """
    for settings in (model.config.get_text_config(), model.generation_config):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            token, old = getattr(tokenizer, name), getattr(settings, name, None)
            ids = old if isinstance(old, list) else [old]
            if token is None or token in ids:
                continue
            several = name == "eos_token_id" and (isinstance(old, list) or settings is model.generation_config)
            kept = [item for item in ids if item is not None]
            setattr(settings, name, [token, *kept] if several and kept else token)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide the warning that PEFT causes by reading a deprecated attribute of transformers models."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def adapter_config(spec: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read the adapter_config.json of a PEFT adapter. Return None if the spec is a model and not an adapter."""
    return _adapter_config(resolve_spec(spec), revision)


def _adapter_config(location: str, revision: str | None) -> dict[str, Any] | None:
    """Read the adapter_config.json of a folder or hub id. Return None if there is none."""
    local = only_cached(location, revision)
    try:
        found = find_adapter_config_file(location, revision=revision, local_files_only=local)
        return None if found is None else dict(json.loads(Path(found).read_text(encoding="utf-8")))
    except _LOADING_ERRORS as error:
        raise _cannot_load("adapter", location, error) from error


def _refuse_named_adapters(location: str, spec: str) -> None:
    """Raise a UserError for a folder whose subfolders contain adapters.

    PEFT saves an adapter in a subfolder if its name is not `default`.
    """
    folder = Path(location)
    nested = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if nested and not (folder / "config.json").exists():
        raise UserError(
            f"{spec} contains adapters only in subfolders; give one of these subfolders: {', '.join(nested)}"
        )


def adapter_base(adapter: dict[str, Any], spec: str) -> str:
    """Return the spec of the base model that an adapter's settings name.

    Args:
        adapter: content of adapter_config.json.
        spec: spec of the adapter, for error messages.

    Raises:
        UserError: the settings name no base model, or one that does not exist.
    """
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter_config.json of {spec} has no base_model_name_or_path; add it")
    try:
        resolve_spec(base)
    except UserError as error:
        raise UserError(
            f"{spec} is an adapter of {base}, which does not exist; correct base_model_name_or_path in its "
            "adapter_config.json, or load the base model with this adapter"
        ) from error
    return str(base)


def _pretrained(location: str, spec: str, **options: Any) -> Any:
    options["local_files_only"] = only_cached(location, options["revision"])
    # transformers' search for adapters has its own option
    options["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}
    try:
        model, loading = _model_class(location, options).from_pretrained(location, output_loading_info=True, **options)
    except _LOADING_ERRORS as error:
        raise _cannot_load("model", spec, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"the checkpoint of {spec} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]}); "
            "give the complete checkpoint of a causal language model"
        )
    return model


def _model_class(location: str, options: dict[str, Any]) -> Any:
    """Return the class that loads a model.

    This is `AutoModelForCausalLM`, or the causal class that the config names if `AutoModelForCausalLM` does not support
    the config (as for Emu3's language model).
    """
    names = ("revision", "trust_remote_code", "local_files_only")
    config = AutoConfig.from_pretrained(location, **{name: options[name] for name in names})
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(config.architectures or ())
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map") or not known:
        return AutoModelForCausalLM
    return getattr(transformers, known.pop())


def _merged(model: Any, location: str, spec: str, revision: str | None) -> Any:
    """Merge an adapter into the model. Raise a UserError if weights of the adapter are missing."""
    try:
        with quiet_peft():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return merge_adapter(PeftModel.from_pretrained(model, location, revision=revision), spec)
    except UserError:
        raise
    except Exception as error:  # each type of adapter raises its own exceptions
        raise _cannot_load("adapter", spec, error) from error


def _cannot_load(what: str, spec: str, error: BaseException) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    if Path(spec).expanduser().exists() or spec.startswith(("gguf:", "package:")):
        return UserError(f"could not load the {what} of {spec}: {reason}")
    return UserError(
        f"could not load the {what} of {spec} from the Hugging Face Hub ({reason}); check the name and the network, or give "
        "an existing folder"
    )
