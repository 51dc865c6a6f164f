"""Run a teacher whose weights transformers divides among the processes (tensor parallelism)."""

import dataclasses
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from transformers.distributed import DistributedConfig

from dwakd.batch import TokenBatch
from dwakd.errors import UserError
from dwakd.models.head import causal_lm
from dwakd.models.rows import response_states


def tensor_parallel(plan: str | dict[str, str]) -> dict[str, Any]:
    """Return the argument of `from_pretrained` that divides the weights among all processes.

    Args:
        plan: auto, which is the plan of the model's architecture, or rules that replace some of this plan.

    Raises:
        UserError: there is only one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(
            "teacher.tp_plan divides the teacher among several processes: start them with torchrun, or use teacher.device_map"
        )
    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    return {"distributed_config": DistributedConfig(tp_plan=plan)} if "tp_plan" in known else {"tp_plan": plan}


def is_tensor_parallel(model: nn.Module) -> bool:
    """Return whether the weights are divided among the processes, which then have to run the model together."""
    return (getattr(causal_lm(model), "_tp_size", None) or 1) > 1


def states_with_ranks(
    model: nn.Module, tokens: TokenBatch, *, attention: bool, packed: bool
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
    """Compute `teacher_states` of each process's batch with a model that is divided among the processes.

    All processes have to call this function equally often. They run the batch of one process after that of another, so the
    memory of the activations does not grow with the number of processes.
    """
    device = tokens.input_ids.device
    own = [ids[:length].tolist() for ids, length in zip(tokens.input_ids, tokens.num_tokens, strict=True)]
    batches: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(batches, (own, list(tokens.num_rows)))
    of_ranks = []
    for sequences, num_rows in batches:
        inputs = [torch.tensor(ids, device=device) for ids in sequences]
        hidden, weights = zip(
            *response_states(model, inputs, num_rows, attention=attention, packed=packed), strict=True
        )
        of_ranks.append((torch.cat(hidden), _mean_over_ranks(torch.cat(weights)) if attention else None))
    return of_ranks[distributed.get_rank()]


def _mean_over_ranks(attention: Tensor) -> Tensor:
    """Return the mean over all attention heads, given that over the heads of each process."""
    distributed.all_reduce(attention)
    return attention / distributed.get_world_size()
