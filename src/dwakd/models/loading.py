"""Models and tokenizers of a spec (`dwakd.models.specs`), ready to use.

No remote code runs unless asked for, and no pickle is read except by transformers with weights_only.
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
    """The tokenizer of a spec; of an adapter without one, its base model's. A missing pad token becomes eos.

    Args:
        spec: see `dwakd.models.specs`.
        trust_remote_code: run the Python code of a hub repository. Off unless you have read that code.
        revision: branch, tag or commit of a hub id.

    Returns:
        A fast tokenizer with an end-of-sequence and a pad token.

    Raises:
        UserError: nothing to load, no fast tokenizer, or no end-of-sequence token.
    """
    location = resolve_spec(spec)
    if Path(location).is_dir() and not any((Path(location) / name).exists() for name in _TOKENIZER_FILES):
        adapter = _adapter_config(location, revision)
        if adapter is None:
            raise UserError(
                f"{spec} holds no tokenizer (no tokenizer.json); name the tokenizer's own folder or hub id."
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
        raise UserError(f"The tokenizer of {spec} has no fast version, and text offsets need one.")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {spec} has no end-of-sequence token; set eos_token in its tokenizer_config.json."
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
    """The causal language model of a spec, in eval mode, adapters merged into its weights.

    Args:
        spec: see `dwakd.models.specs`. A PEFT adapter's folder or hub id loads the base that it names, and merges.
        adapter: a PEFT adapter, folder or hub id, that is merged into the model of `spec`.
        dtype: of the weights.
        trust_remote_code: run the Python code of a hub repository. Off unless you have read that code.
        revision: branch, tag or commit of a hub id; it goes with `spec`, not with `adapter`.

    Raises:
        UserError: nothing to load, not a causal language model, or weights missing.
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
            raise UserError(f"{adapter} is no PEFT adapter (no adapter_config.json); give the adapter's folder.")
        model = _merged(model, folder, adapter, None)
    return model.eval()


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer whose ids exceed the model's embedding table; a wider table (Qwen's) is fine."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens but its model only {rows} embeddings; "
            "they do not belong together."
        )


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """Give the model's settings the tokenizer's special tokens: an id that they lack is one that never ends an answer.

    End tokens are added to those of the generation settings; beginning and padding are replaced.
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
    """PEFT asks transformers for an attribute by its old name; its user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def adapter_config(spec: str, revision: str | None = None) -> dict[str, Any] | None:
    """The settings of the PEFT adapter that a spec names; None if it names a whole model."""
    return _adapter_config(resolve_spec(spec), revision)


def _adapter_config(location: str, revision: str | None) -> dict[str, Any] | None:
    """The adapter_config.json of a folder or hub id, or None."""
    local = only_cached(location, revision)
    try:
        found = find_adapter_config_file(location, revision=revision, local_files_only=local)
        return None if found is None else dict(json.loads(Path(found).read_text(encoding="utf-8")))
    except _LOADING_ERRORS as error:
        raise _cannot_load("adapter", location, error) from error


def _refuse_named_adapters(location: str, spec: str) -> None:
    """Refuse a folder that only holds folders with adapters: PEFT saves one that is not named `default` so."""
    folder = Path(location)
    nested = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if nested and not (folder / "config.json").exists():
        raise UserError(f"{spec} holds no adapter itself but in folders; give one of them: {', '.join(nested)}")


def adapter_base(adapter: dict[str, Any], spec: str) -> str:
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{spec} is an adapter whose adapter_config.json names no base_model_name_or_path; add it.")
    try:
        resolve_spec(base)
    except UserError as error:
        raise UserError(
            f"{spec} is an adapter of {base}, which cannot be found; mend base_model_name_or_path in its "
            "adapter_config.json, or load the base model with this adapter."
        ) from error
    return str(base)


def _pretrained(location: str, spec: str, **options: Any) -> Any:
    options["local_files_only"] = only_cached(location, options["revision"])
    options["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}  # its look-up has its own option
    try:
        model, loading = _model_class(location, options).from_pretrained(location, output_loading_info=True, **options)
    except _LOADING_ERRORS as error:
        raise _cannot_load("model", spec, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"The checkpoint of {spec} lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}; it is not a whole causal language model."
        )
    return model


def _model_class(location: str, options: dict[str, Any]) -> Any:
    """`AutoModelForCausalLM`, or the causal class of a config that it does not know (Emu3's language model)."""
    names = ("revision", "trust_remote_code", "local_files_only")
    config = AutoConfig.from_pretrained(location, **{name: options[name] for name in names})
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(config.architectures or ())
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map") or not known:
        return AutoModelForCausalLM
    return getattr(transformers, known.pop())


def _merged(model: Any, location: str, spec: str, revision: str | None) -> Any:
    """The model with an adapter's change added to its weights; an adapter that fits only in part is refused."""
    try:
        with quiet_peft():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return merge_adapter(PeftModel.from_pretrained(model, location, revision=revision), spec)
    except UserError:
        raise
    except Exception as error:  # each kind of adapter has its own
        raise _cannot_load("adapter", spec, error) from error


def _cannot_load(what: str, spec: str, error: BaseException) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    if Path(spec).expanduser().exists() or spec.startswith(("gguf:", "package:")):
        return UserError(f"The {what} of {spec} cannot be loaded: {reason}.")
    return UserError(
        f"The {what} of {spec} cannot be had from the Hugging Face hub ({reason}); no such folder exists here."
    )
