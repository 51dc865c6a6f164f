"""Record the attention of the last position of each sequence while a model runs with its usual attention function."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dwakd.errors import UserError

_UNKNOWN_TERMS = ("s_aux", "sinks", "position_bias")


class LastLayer:
    """Queries and keys of the last call of an attention function, which is the call of the model's last layer."""

    call: tuple[Tensor, Tensor, Any, dict[str, Any]] | None = None

    @torch.no_grad()
    def row(self, last: Int[Tensor, " batch"]) -> Float[Tensor, "batch length"]:
        """Compute the attention weights of the position `last` of each sequence, summed over the heads.

        The weights are constants in float32 or float64, without dropout.

        Raises:
            UserError: the model does not use transformers' attention functions, or adds unsupported terms to the scores.
        """
        if self.call is None or any(self.call[3].get(name) is not None for name in _UNKNOWN_TERMS):
            raise UserError(
                "the attention of a model cannot be read (unsupported attention function); set loss.span_weights=uniform, "
                "which needs no attention"
            )
        queries, keys, mask, options = self.call
        rows, places = torch.arange(len(last), device=last.device), torch.arange(keys.shape[2], device=last.device)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        keys = keys.to(dtype).repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = (keys @ queries[rows, :, last].to(dtype)[..., None]).squeeze(-1)
        scores = scores * (options.get("scaling") or keys.shape[-1] ** -0.5)
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        window = options.get("sliding_window") or len(places)
        unseen = (places > last[:, None]) | (places <= last[:, None] - window)
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask.expand(len(rows), -1, -1, -1)[rows, :, last]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).sum(1)


@contextlib.contextmanager
def last_layer(config: PretrainedConfig) -> Iterator[LastLayer]:
    """Record queries and keys of the last attention call of a model, given its text config, inside a `with` block."""
    name, noted = config._attn_implementation, LastLayer()
    usual = ALL_ATTENTION_FUNCTIONS.get(name)

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        noted.call = query.detach(), key.detach(), attention_mask, options
        # eager functions are not in the registry; they are defined in the module of their model
        run = usual or sys.modules[type(module).__module__].eager_attention_forward
        return run(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS[name] = note
    try:
        yield noted
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
