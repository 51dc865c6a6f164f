"""Run the ULD loss of TRL's GOLD trainer as a peer of `uld` and `gold`. Optional: `pip install trl`.

TRL's loss takes the logits of whole sequences with autograd. Here it gets those of the response tokens only, at the
positions where its "bayesian" merge strategy expects them.
"""

import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from benchmarks.workload import Sizes, build_tokens
from dwakd.batch import PairedBatch, TokenBatch

OPTIONS: dict[str, dict[str, Any]] = {
    "uld": {"use_extended_uld": False, "uld_crossentropy_weight": 1.0, "uld_distillation_weight": 1.5},
    "gold": {"uld_use_hybrid_loss": True},
}
"""TRL's options that give the same loss as dwakd's method of this name."""


def absent() -> str | None:
    """Return one line that says why TRL cannot run, or None if it can."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        importlib.import_module("trl.experimental.gold.gold_trainer")
    except (ImportError, RuntimeError) as error:
        return f"TRL is left out, because it cannot be imported: {error}"
    return None


def criterion(method: str, sizes: Sizes) -> Callable[..., Tensor]:
    """Build TRL's loss, a function of both sides' logits, labels, ids and byte offsets."""
    gold = importlib.import_module("trl.experimental.gold.gold_trainer")
    common: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "uld_token_merge_strategy": "bayesian",
    }
    config = gold.GOLDConfig(**common, uld_skip_student_eos=False, uld_skip_teacher_eos=False, **OPTIONS[method])
    tokenizers = [
        SimpleNamespace(get_vocab=lambda tokens=tokens: {token.decode(): n for n, token in enumerate(tokens)})
        for tokens in build_tokens(sizes)
    ]
    loss: Callable[..., Tensor] = gold.ULDLoss(config, *tokenizers, device="cpu")
    return loss


def response_columns(mask: Tensor) -> slice:
    """Return the range of positions that contains the response tokens of all examples."""
    columns = mask.any(0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1)


def hidden_window(model: PreTrainedModel, tokens: TokenBatch) -> Tensor:
    """Return the final hidden states of the response positions, plus one because the first position has no label."""
    hidden = model.base_model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return pad(hidden[:, response_columns(tokens.response_mask)], (0, 0, 0, 1))


def loss_of_windows(
    loss: Callable[..., Tensor],
    windows: tuple[Tensor, Tensor],
    models: tuple[PreTrainedModel, PreTrainedModel],
    batch: PairedBatch,
) -> Tensor:
    """Compute the loss from the results of `hidden_window` for student and teacher."""
    logits = [model.get_output_embeddings()(window) for model, window in zip(models, windows, strict=True)]
    labels, ends = [], []
    for tokens in batch:
        mask = tokens.response_mask
        columns = response_columns(mask)
        # the logits at one position predict the label at the next
        labels.append(pad(tokens.target_ids.masked_fill(~mask, -100)[:, columns], (1, 0), value=-100))
        ends.append(pad(tokens.byte_ends[:, columns], (1, 0))[..., None].expand(-1, -1, 2))
    return loss(*logits, *labels, *(side.clamp_min(0) for side in labels), *ends)


def step_loss(
    loss: Callable[..., Tensor], models: tuple[PreTrainedModel, PreTrainedModel], batch: PairedBatch
) -> Tensor:
    """Compute the loss of a batch, including the forward passes of both models."""
    student, teacher = models
    with torch.no_grad():
        teacher_window = hidden_window(teacher, batch.teachers[0])
    return loss_of_windows(loss, (hidden_window(student, batch.student), teacher_window), models, batch)
