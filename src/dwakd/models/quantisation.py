"""Quantised models: the config that a recipe describes, and plain matrices for the head and the embeddings."""

import importlib
import inspect
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from dwakd.errors import UserError


def quantization(options: dict[str, Any]) -> Any:
    """Return the quantisation config of transformers with these options.

    The type of a torchao quantisation is a name, and its options are among the others: {quant_method: torchao,
    quant_type: Int8WeightOnlyConfig}.

    Raises:
        UserError: an option is unknown, which transformers would ignore.
    """
    method = "bitsandbytes_8bit" if options.keys() & {"load_in_4bit", "load_in_8bit"} else options.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UserError(
            f"quantization_config.quant_method must be one of {', '.join(AUTO_QUANTIZATION_CONFIG_MAPPING)}, got {method}"
        )
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    known = {*inspect.signature(kind).parameters, "quant_method"} - {"kwargs"}
    others = {name: value for name, value in options.items() if name not in known}
    if method == "torchao" and isinstance(options.get("quant_type"), str):
        own = {name: options[name] for name in options.keys() & known - {"quant_method", "quant_type"}}
        return kind(getattr(importlib.import_module("torchao.quantization"), options["quant_type"])(**others), **own)
    if others:
        raise UserError(f"quantization_config: {min(others)} is unknown; {method} has: {', '.join(sorted(known))}")
    return AutoQuantizationConfig.from_dict(options)


def is_quantised(model: Any) -> bool:
    """Return whether transformers has quantised a model."""
    return getattr(model, "hf_quantizer", None) is not None


def quantised_weight(module: Any) -> bool:
    """Return whether a module has a quantised weight, with which products of matrices cannot be computed directly."""
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def dequantise_ends(model: Any) -> None:
    """Replace a quantised output head and a quantised embedding table by plain modules, because losses read their weights."""
    if quantised_weight(table := model.get_input_embeddings()):
        weight = dequantize_module_weight(table).detach().to(model.dtype)
        rows, width = weight.shape
        model.set_input_embeddings(nn.Embedding(rows, width, _weight=weight, _freeze=True))
    if quantised_weight(head := model.get_output_embeddings()):
        weight = dequantize_module_weight(head).detach().to(model.dtype)
        plain = nn.Linear(1, 1, bias=False)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), head.bias
        model.set_output_embeddings(plain)
