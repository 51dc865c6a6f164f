"""Save a causal language model. Invalid settings never prevent the weights from being saved."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dwakd.errors import UserError, reason_of
from dwakd.models.head import model_name

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def save_causal_lm(model: Any, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Save a model in the format of transformers, or an adapter in the format of PEFT, into one folder.

    PEFT would save an adapter whose name is not "default" in a subfolder. If transformers refuses to save the generation
    settings, a warning says so. Tensors in `state_dict` are saved instead of the model's own.

    Raises:
        UserError: the config cannot be saved. The weights are in the folder nevertheless.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        card = folder / "README.md"
        before = card.read_bytes() if card.exists() else None
        model.save_pretrained(folder, state_dict=state_dict)
        if before is not None:
            card.write_bytes(before)
        else:  # PEFT's card, with the path of a local base model
            card.unlink(missing_ok=True)
        (adapter,) = model.peft_config
        if (folder / adapter / "adapter_config.json").is_file():
            for path in (folder / adapter).iterdir():
                path.replace(folder / path.name)
            (folder / adapter).rmdir()
        return
    remove_unused_sampling(model)
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # validators of configs raise exceptions of their own types
        file = folder / "model.safetensors"
        save_model(model, str(file)) if state_dict is None else save_file(state_dict, file)
        reason, fix = " ".join(str(error).split()), f"correct it and save it next to the weights, which are in {file}"
        raise UserError(f"the config of the model cannot be saved ({reason}); {fix}") from error
    finally:
        model.generation_config = settings
    try:
        if model.can_generate():
            settings.save_pretrained(folder)
    except (ValueError, TypeError, AttributeError) as error:  # the settings may contain any value
        logger.warning("saved the model in %s without its generation settings: %s", folder, reason_of(error))


def remove_unused_sampling(model: PreTrainedModel) -> None:
    """Reset the sampling settings that greedy decoding ignores, because transformers refuses to save them."""
    settings, default = model.generation_config, GenerationConfig()
    if settings is None or settings.do_sample:
        return
    unused = [name for name in _SAMPLING if getattr(settings, name, None) not in (None, getattr(default, name))]
    for name in unused:
        setattr(settings, name, getattr(default, name))
    if unused:
        logger.warning(
            "reset %s in the generation settings of %s, which have no effect without do_sample=True",
            *(", ".join(unused), model_name(model)),
        )
