"""Saving a causal language model so that a setting never costs its weights."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file, save_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dwakd.errors import UserError
from dwakd.models.rows import model_name

logger = logging.getLogger(__name__)

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings that greedy decoding ignores, and that transformers refuses to save together with it."""


def save_causal_lm(model: Any, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Save a model as transformers or PEFT does, the weights first.

    An adapter is saved in the folder itself, whatever its name: PEFT would put one that is not called "default" into a
    subfolder. Settings that transformers refuses to save never cost the weights.

    Args:
        model: the model.
        folder: created if it does not exist.
        state_dict: the model's tensors, if not its own.

    Raises:
        UserError: the config cannot be saved; the weights are in the folder.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict)
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
    except OSError:
        raise
    except Exception as error:  # validators of configs raise their own types
        if state_dict is None:
            save_model(model, str(folder / "model.safetensors"))
        else:
            save_file(state_dict, folder / "model.safetensors")
        raise UserError(
            f"the config of the model cannot be saved ({' '.join(str(error).split())}); its weights are in "
            f"{folder / 'model.safetensors'}"
        ) from error
    finally:
        model.generation_config = settings
    try:
        if model.can_generate():
            settings.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # settings may hold anything
        logger.warning("%s has the model without its generation settings: %s", folder, " ".join(str(error).split()))


def remove_unused_sampling(model: PreTrainedModel) -> None:
    """Reset the sampling settings that greedy decoding ignores, with a warning; transformers refuses to save them."""
    settings = model.generation_config
    if settings is None or settings.do_sample:
        return
    default = GenerationConfig()
    unused = [name for name in SAMPLING_SETTINGS if getattr(settings, name, None) not in (None, getattr(default, name))]
    for name in unused:
        setattr(settings, name, getattr(default, name))
    if unused:
        logger.warning(
            "removed %s from the generation settings of %s: without do_sample=True they have no effect, and "
            "transformers does not save them",
            ", ".join(unused),
            model_name(model),
        )
