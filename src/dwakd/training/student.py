"""Checks of a student before the first step: it can be trained, and its saved folder will contain the same model."""

import copy
import logging
import tempfile
from functools import reduce
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dwakd.errors import UserError
from dwakd.models.head import causal_lm, embedding_table, model_name, output_head
from dwakd.models.loading import quiet_peft
from dwakd.models.quantisation import is_quantised
from dwakd.models.rows import evaluating
from dwakd.models.saving import remove_unused_sampling
from dwakd.recipe.sections import check_task_type, lora_config

logger = logging.getLogger(__name__)


def check_student(student: nn.Module) -> None:
    """Refuse a student that cannot be trained or saved, or that would be another model when its folder is loaded.

    Saves the settings to a temporary folder, builds the model that they describe with copies of the student's tensors, and
    compares the logits of both on a small batch. Sampling settings that greedy decoding ignores are reset, because
    transformers refuses to save them.

    Raises:
        UserError: names the setting, the tensor or the adapter that does not fit.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        hint = " (for a saved adapter: PeftModel.from_pretrained(..., is_trainable=True))"
        raise UserError(
            f"no parameter of the student {model_name(student)} requires gradients, so training would not change it: "
            f"set requires_grad on what should be trained{hint if isinstance(student, PeftModel) else ''}"
        )
    if isinstance(student, PeftModel):
        _check_adapter(student)
    elif is_quantised(student):
        raise UserError(
            f"the weights of the student {model_name(student)} are quantised, and quantised weights cannot be trained: train "
            "an adapter (student.peft, or peft_config)"
        )
    elif getattr(student, "_hf_peft_config_loaded", False):
        raise UserError(
            f"the student {model_name(student)} has an adapter from add_adapter, whose base model would not be saved: "
            "pass the base model and the adapter's config as peft_config, or pass a peft.PeftModel"
        )
    elif (
        isinstance(student, PreTrainedModel)
        and not is_deepspeed_zero3_enabled()
        and len({p.device for p in student.parameters()}) == 1  # otherwise it cannot be rebuilt from its tensors
    ):
        _check_same(student, _restored(student, _saved_config(student)))
    if not is_deepspeed_zero3_enabled():  # DeepSpeed keeps the weights in float32 as well
        _check_precision(student)


def add_adapter(model: nn.Module, config: PeftConfig | dict[str, Any] | None) -> Any:
    """Add an adapter to the student, if there is one; refuse one that changes the head's matrix or that cannot be saved."""
    if config is None:
        return model
    config = lora_config(config) if isinstance(config, dict) else config
    check_task_type(config)
    if isinstance(model, PeftModel):
        raise UserError("the student has an adapter already: leave out peft_config, or pass its base model")
    if merged := getattr(model, "merged_adapter", None):
        raise UserError(
            f"the student {merged} is an adapter. A new adapter would be saved for the original base model and lose this one: "
            f"leave out student.peft (peft_config), or save load_causal_lm({merged!r}) and its tokenizer, and train that"
        )
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"peft_config (student.peft): {error}") from error
    if not getattr(model.config, "name_or_path", ""):
        logger.warning(
            "the student was not loaded from a folder or the hub, so its adapter will be saved without the name of its base "
            "model: save the base model, load it, and train that"
        )
    output_head(adapted)
    embedding_table(adapted)
    check_student(adapted)
    return adapted


def _check_precision(student: nn.Module) -> None:
    """Refuse trained parameters in float16, in which AdamW's second moments vanish, and warn of those in bfloat16."""
    trained = {name: one.dtype for name, one in student.named_parameters() if one.requires_grad}
    fix = "load the student with dtype=torch.float32 (student.dtype: float32); fp16 and bf16 still train in mixed precision"
    if found := next((name for name, dtype in trained.items() if dtype == torch.float16), None):
        raise UserError(
            f"the parameter {found} of the student {model_name(student)} would be trained in float16: {fix}"
        )
    if torch.bfloat16 in trained.values():
        logger.warning(
            "the student %s is trained in bfloat16, which rounds small updates away: %s", model_name(student), fix
        )


def widest_dtype(model: nn.Module) -> torch.dtype:
    """Return the narrowest dtype that holds every floating-point parameter of a model exactly."""
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return reduce(torch.promote_types, dtypes)


def freeze_unused(student: nn.Module) -> None:
    """Freeze the parts of a student that read images or sound, which get no gradient, so that DDP does not wait for one."""
    lm = causal_lm(student)
    if lm.config.get_text_config() is lm.config or not hasattr(lm, "get_decoder"):
        return
    used = [lm.get_decoder(), lm.get_input_embeddings(), lm.get_output_embeddings()]
    kept = {id(parameter) for module in used if module is not None for parameter in module.parameters()}
    unused = [one for one in student.parameters() if one.requires_grad and id(one) not in kept]
    if unused:
        count = sum(one.numel() for one in unused)
        logger.warning("%s: %d parameters that read no text are not trained", model_name(student), count)
    for parameter in unused:
        parameter.requires_grad_(False)


def check_optimizer(optimizer: torch.optim.Optimizer | None, module: nn.Module) -> None:
    """Refuse an optimiser of the user that lacks a trained parameter, such as the maps that the trainer has created."""
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UserError(
                f"the optimizer given in optimizers lacks the trained parameter {name}: use optim and optim_args instead, or "
                "set trainer.optimizer to an optimizer of trainer.model.parameters()"
            )


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that shares parameters with the student, because the teacher's parameters are frozen."""
    shared = {_storage(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if _storage(parameter) in shared:
            raise UserError(
                f"student and teacher share the parameter {name}, and the teacher is frozen: load the teacher separately"
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0: in modules, plain attributes, and configs that the forward pass reads.

    The configs of the submodules are replaced by copies, so that the model's own config is saved unchanged.
    """
    copies: dict[int, PretrainedConfig] = {}
    saved = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _set_rates_to_zero(module)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and module not in (model, saved):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                _set_rates_to_zero(copies[id(config)])
            module.config = copies[id(config)]


def _set_rates_to_zero(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if "drop" in name.lower() and isinstance(value, float):
            setattr(owner, name, 0.0)


def _storage(parameter: torch.Tensor) -> tuple[str, int]:
    try:
        pointer = parameter.untyped_storage().data_ptr()
    except RuntimeError:  # a quantised tensor of torchao consists of others
        pointer = 0
    return str(parameter.device), pointer or id(parameter)


def _check_adapter(student: PeftModel) -> None:
    if len(student.peft_config) > 1:
        raise UserError(
            f"the student has several adapters ({', '.join(student.peft_config)}), of which one can be saved: merge the "
            "others into its base model or delete them"
        )
    ((adapter, config),) = student.peft_config.items()
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise UserError("peft_config: the random numbers of init_lora_weights=pissa_niter_... are not saved: use pissa")
    if getattr(config, "layer_replication", None):
        raise UserError("peft_config: an adapter with layer_replication could not be merged: leave it out")
    saved = get_peft_model_state_dict(student, adapter_name=adapter, save_embedding_layers=False)
    kept = {_storage(tensor) for tensor in saved.values()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and _storage(parameter) not in kept:
            raise UserError(
                f"the student's parameter {name} is trained but is not part of its adapter, so it would not be saved: "
                "freeze it, or name its module in modules_to_save"
            )


def _saved_config(student: PreTrainedModel) -> PretrainedConfig:
    """Return the config as it is read back from the files that would be saved."""
    remove_unused_sampling(student)
    what = "settings of the student {} cannot be saved"
    with tempfile.TemporaryDirectory() as folder:
        try:
            if student.can_generate():
                student.generation_config.save_pretrained(folder)
            student.config.save_pretrained(folder)
            what = "config of the student {} cannot be read again after it is saved"
            return type(student.config).from_pretrained(folder)
        except Exception as error:  # validators raise exceptions of their own types
            raise UserError(f"the {what.format(model_name(student))}: {' '.join(str(error).split())}") from error


def _restored(student: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model that the saved folder of the student would give. It shares the student's parameters."""
    name = model_name(student)
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model_class: Any = known if isinstance(known, type) else type(student)
    implementation = student.config._attn_implementation
    try:
        with torch.random.fork_rng(), no_init_weights():
            restored = model_class._from_config(config, dtype=widest_dtype(student), attn_implementation=implementation)
            restored.tie_weights()
    except Exception as error:  # the code of a model may raise any exception
        reason = " ".join(str(error).split())
        raise UserError(f"the student {name} cannot be loaded again after it is saved: {reason}") from error
    own, described = student.state_dict(), restored.state_dict()
    differences = {
        "describes {}, which the model does not have": described.keys() - own.keys(),
        # loading ignores buffers that are not in the config
        "does not describe {}": own.keys() - described.keys() - dict(student.named_buffers()).keys(),
        "describes {} in another shape": {
            key for key in own.keys() & described.keys() if own[key].shape != described[key].shape
        },
        "describes other sharing of {}": _shared(student) ^ _shared(restored),
    }
    for words, keys in differences.items():
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            _refuse_other(name, f"its config {words.format(min(keys) + more)}")
    restored.load_state_dict(own, strict=False, assign=True)
    return restored


def _shared(model: nn.Module) -> set[str]:
    """Return the names of parameters that share memory, joined by " and "."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_storage(parameter), []).append(name)
    return {" and ".join(sorted(names)) for names in groups.values() if len(names) > 1}


def _check_same(student: PreTrainedModel, restored: PreTrainedModel) -> None:
    """Refuse a student whose logits differ from those of the restored model."""
    buffers = dict(student.named_buffers())
    for name, buffer in restored.named_buffers():  # student.to(torch.bfloat16) rounds rotary frequencies
        own = buffers.get(name)
        if own is None or own.shape != buffer.shape or not own.is_floating_point():
            continue
        if torch.allclose(own.detach().to(buffer).float(), buffer.float(), rtol=1e-2, atol=1e-6):
            buffer.data = own.detach().clone()
    vocab_size = student.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(16, device=student.device) * 7 % vocab_size).view(2, 8)
    with torch.no_grad(), evaluating(student), evaluating(restored.to(student.device)):
        expected, found = (model(input_ids=ids, use_cache=False).logits.float() for model in (student, restored))
    expected, found = (logits.nan_to_num(neginf=0.0) for logits in (expected, found))
    dtypes = {parameter.dtype for parameter in student.parameters()}
    tolerance = 1e-4 if widest_dtype(student).itemsize >= 4 and len(dtypes) == 1 else 3e-2
    difference = float((expected - found).abs().max())
    if not difference <= tolerance * (1 + float(expected.abs().max())):
        _refuse_other(model_name(student), f"its config does not describe all of it: logits differ by {difference:.3g}")


def _refuse_other(name: str, reason: str) -> NoReturn:
    raise UserError(
        f"the student {name} would be another model when its saved folder is loaded, because {reason}; correct the model "
        "or its config"
    )
