"""Load models and tokenizers by a spec (`dwakd.models.specs`).

Remote code runs only if `trust_remote_code` is set. Pickle files are read only by transformers, with weights_only.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from dwakd.data.chat import check_tokenizer
from dwakd.data.special_tokens import needed_embeddings
from dwakd.errors import UserError, explained
from dwakd.models.adapters import merge_adapter
from dwakd.models.head import causal_lm, num_embeddings
from dwakd.models.parallel import tensor_parallel
from dwakd.models.quantisation import dequantise_ends, is_quantised, quantization
from dwakd.models.specs import only_cached, resolve_spec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")


def load_tokenizer(
    spec: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    chat_template_path: str | None = None,
) -> Any:
    """Load the tokenizer of a model: a fast one with an end-of-sequence and a pad token.

    For a PEFT adapter without a tokenizer, the tokenizer of its base model is loaded. If the tokenizer has no pad token,
    its end-of-sequence token is used for padding.

    Args:
        spec: a folder, a hub id, gguf:PATH or package:NAME/FILE, see `dwakd.models.specs`.
        trust_remote_code: run the Python code of a hub repository. Set it only if you have read that code.
        revision: branch, tag or commit of a hub id.
        chat_template_path: see `set_chat_template`.

    Raises:
        UserError: the tokenizer cannot be loaded, has no fast version or has no end-of-sequence token.
    """
    location = resolve_spec(spec)
    if Path(location).is_dir() and not any((Path(location) / name).exists() for name in _TOKENIZER_FILES):
        adapter = adapter_config(location, revision)
        if adapter is None:
            raise UserError(f"{spec} contains no tokenizer.json; give the folder or hub id of the tokenizer")
        base = adapter_base(adapter, spec)
        return load_tokenizer(base, trust_remote_code=trust_remote_code, chat_template_path=chat_template_path)
    options: dict[str, Any] = {"revision": revision, "local_files_only": only_cached(location, revision)}
    if find_spec("mistral_common") is not None:
        options["mistral_format"] = False  # tekken.json has no offsets, and tokenizer.json is beside it
    with explained(_failure("tokenizer", spec)):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    check_tokenizer(tokenizer, spec)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_path is not None:
        set_chat_template(tokenizer, chat_template_path, trust_remote_code=trust_remote_code)
    return tokenizer


def set_chat_template(tokenizer: Any, source: str, *, trust_remote_code: bool = False) -> None:
    """Give a tokenizer the chat template of a file, or that of another model, and no new tokens.

    Markers of the template that are no special tokens of the tokenizer are encoded like other text.

    Args:
        tokenizer: the tokenizer. Its `save_pretrained` also saves the template.
        source: a file with a Jinja template, or a model as in `load_tokenizer`.
        trust_remote_code: as in `load_tokenizer`.

    Raises:
        UserError: the file cannot be read, or the model has no chat template.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        with explained(f"chat_template_path: could not read the chat template in {source}"):
            template = path.read_text(encoding="utf-8")
    else:
        template = load_tokenizer(source, trust_remote_code=trust_remote_code).chat_template
    if not (template and str(template).strip()):
        raise UserError(f"chat_template_path: {source} has no chat template; give a file with one, or a chat model")
    tokenizer.chat_template = template


def load_causal_lm(
    spec: str,
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a causal language model in eval mode and merge its adapters into its weights.

    Args:
        spec: a folder, a hub id, gguf:PATH or package:NAME/FILE, see `dwakd.models.specs`. If it is a PEFT adapter, its
            base model is loaded and the adapter is merged.
        adapter: folder or hub id of a PEFT adapter to merge into the model of `spec`.
        dtype: dtype of the weights.
        trust_remote_code: run the Python code of a hub repository. Set it only if you have read that code.
        revision: branch, tag or commit of `spec` if that is a hub id. It does not apply to `adapter`.
        options: `attn_implementation`, `quantization_config` (or its options as a dict), `device_map` and `tp_plan` of
            transformers. An adapter of a quantised model is not merged. A quantised output head or embedding table is
            dequantised.

    Raises:
        UserError: the model cannot be loaded, is not a causal language model or lacks weights.
    """
    location = resolve_spec(spec)
    own_adapter = adapter_config(location, revision)
    if own_adapter is None:
        own = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = _pretrained(location, spec, dtype, own, options)
    else:
        base = adapter_base(own_adapter, spec)
        model = load_causal_lm(base, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        model = _merged(model, location, spec, revision)
    if adapter is not None:
        if adapter_config(adapter) is None:
            raise UserError(f"{adapter} has no adapter_config.json; give the folder or hub id of a PEFT adapter")
        model = _merged(model, resolve_spec(adapter), adapter, None)
    return model.eval()


def load_config(spec: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a model without its weights; for an adapter, that of its base model."""
    settings = adapter_config(spec, revision)
    if settings is not None:
        return load_config(adapter_base(settings, spec), trust_remote_code=trust_remote_code)
    location = resolve_spec(spec)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": only_cached(location, revision)}
    with explained(_failure("model", spec)):
        return AutoConfig.from_pretrained(location, revision=revision, **options)


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise a UserError if the tokenizer has ids for which the model has no embedding; more embeddings are accepted."""
    check_embeddings(tokenizer, num_embeddings(model), name)


def check_embeddings(tokenizer: Any, rows: int, name: str) -> None:
    """Raise a UserError if a tokenizer needs more embeddings than the rows of a model's table."""
    needed = needed_embeddings(tokenizer)
    if needed > rows:
        found = f"token ids up to {needed - 1}, but the model has {rows} embeddings"
        raise UserError(f"the tokenizer of {name} has {found}; use its own tokenizer")


def check_positions(config: Any, name: str, max_length: int) -> None:
    """Raise a UserError if a model has fewer positions than the longest row."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise UserError(
            f"data.max_length is {max_length}, but {name} has only {positions} positions; lower data.max_length"
        )


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """Copy the tokenizer's special tokens into the model's config; add its end token to those that stop generation."""
    for settings in (model.config.get_text_config(), model.generation_config):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            token, old = getattr(tokenizer, name), getattr(settings, name, None)
            ids = old if isinstance(old, list) else [old]
            if token is None or token in ids:
                continue
            several = name == "eos_token_id" and (isinstance(old, list) or settings is model.generation_config)
            kept = [item for item in ids if item is not None]
            setattr(settings, name, [token, *kept] if several and kept else token)


def add_end_token(model: Any, token_id: int) -> None:
    """Let the saved model stop at the token that ends an answer, which a chat template may write instead of the eos token."""
    config = causal_lm(model).generation_config
    old = config.eos_token_id
    ids = old if isinstance(old, list) else [old]
    if token_id not in ids:
        config.eos_token_id = [token_id, *(item for item in ids if item is not None)]


def adapter_config(spec: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read the adapter_config.json of a PEFT adapter. Return None if the spec is a model and not an adapter.

    A folder with adapters in subfolders only, where PEFT saves those with a name, is refused.
    """
    location = resolve_spec(spec)
    local = only_cached(location, revision)
    with explained(_failure("adapter", location)):
        found = find_adapter_config_file(location, revision=revision, local_files_only=local)
        if found is not None:
            return dict(json.loads(Path(found).read_text(encoding="utf-8")))
    nested = sorted(path.parent.name for path in Path(location).glob("*/adapter_config.json"))
    if nested and not (Path(location) / "config.json").exists():
        raise UserError(f"{spec} contains adapters in subfolders only; give one of these: {', '.join(nested)}")
    return None


def adapter_base(adapter: dict[str, Any], spec: str) -> str:
    """Return the spec of the base model that the adapter_config.json of the adapter `spec` names, if it exists."""
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter_config.json of {spec} has no base_model_name_or_path; add it")
    try:
        resolve_spec(base)
    except UserError as error:
        fix = "correct base_model_name_or_path in its adapter_config.json, or load the base model with this adapter"
        raise UserError(f"{spec} is an adapter of {base}, which does not exist; {fix}") from error
    return str(base)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide the warning that PEFT causes by reading a deprecated attribute of transformers models."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def on_device(model: Any, device: torch.device | None) -> Any:
    """Move a model to a device, unless transformers has put it on the devices of a device map."""
    lm = causal_lm(model)
    placed = getattr(lm, "hf_device_map", None) or (is_quantised(lm) and device and lm.device.type == device.type)
    return model if placed else model.to(device)


def _pretrained(location: str, spec: str, dtype: torch.dtype, options: dict[str, Any], more: dict[str, Any]) -> Any:
    local = {"local_files_only": only_cached(location, options["revision"])}
    with explained(_failure("model", spec)):
        config = AutoConfig.from_pretrained(location, **options, **local)
        # AutoModelForCausalLM does not support every causal class that a config names (for example Emu3's)
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(config.architectures or ())
        auto = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map") or not known
        model_class = AutoModelForCausalLM if auto else getattr(transformers, known.pop())
        if (plan := more.get("tp_plan")) is not None:
            more = {name: value for name, value in more.items() if name != "tp_plan"} | tensor_parallel(plan)
        if isinstance(given := more.get("quantization_config"), dict):
            more = more | {"quantization_config": quantization(given)}
        options |= {**local, **more, "adapter_kwargs": local}  # transformers' search for adapters has its own options
        model, loading = model_class.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(loading["missing_keys"]):
        lack = f"{len(missing)} weights of {type(model).__name__} (first: {missing[0]})"
        raise UserError(f"the checkpoint of {spec} lacks {lack}; give the checkpoint of a causal language model")
    dequantise_ends(model)
    return model


def _merged(model: Any, location: str, spec: str, revision: str | None) -> Any:
    """Merge an adapter into the model, whose `merged_adapter` becomes its name.

    Raises:
        UserError: weights of the adapter are missing, or it cannot be merged.
    """
    with explained(_failure("adapter", spec)), quiet_peft():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, location, revision=revision)
        if is_quantised(model):
            return adapted
        merged = merge_adapter(adapted, spec).requires_grad_(True)  # PEFT has frozen the weights
        merged.merged_adapter = spec
        return merged


def _failure(what: str, spec: str) -> str:
    """Return the beginning of the message of an error while loading."""
    if Path(spec).expanduser().exists() or spec.startswith(("gguf:", "package:")):
        return f"could not load the {what} of {spec}"
    fix = "check the name and the network, or give an existing folder; a download that was interrupted is continued"
    return f"could not load the {what} of {spec} from the Hugging Face Hub; {fix}"
