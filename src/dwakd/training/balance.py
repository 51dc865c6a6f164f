"""Balance the terms of a loss by the norms of their gradients at the student's hidden states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

KEY = "term_gradient_squares"
_DECAY = 0.8
"""Weight of the earlier measurements in the running mean of squared norms."""


def term_scales(squares: Mapping[str, float], limit: float | None) -> dict[str, float]:
    """Compute the factor of each term so that no gradient norm exceeds `limit` times that of the cross-entropy.

    Args:
        squares: the squared gradient norm of each term, times its weight and without its factor.
        limit: the largest norm as a multiple of that of `ce`; None for no limit.

    Returns:
        min(1, limit * |g_ce| / |g_term|) for each term except `ce`; empty without a limit or a gradient of `ce`.
    """
    allowed = limit * squares.get("ce", 0.0) ** 0.5 if limit is not None else 0.0
    if not allowed:
        return {}
    return {name: min(1.0, allowed / square**0.5) for name, square in squares.items() if name != "ce" and square}


class TermBalance(TrainerCallback):
    """Average the squared gradient norms of the terms over the measured steps.

    The averages are a part of the trainer's state, so that checkpoints contain them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._found: dict[str, Tensor] = {}

    @property
    def scales(self) -> dict[str, float]:
        """The factor of each term in the next step."""
        return term_scales(self.trainer.state.stateful_callbacks.get(KEY, {}), self.trainer.args.term_gradient_limit)

    def add(self, squares: Mapping[str, Tensor], weight: float) -> None:
        """Add the squared norms of a micro-batch; see `Distiller.gradient_squares`."""
        for name, value in squares.items():
            self._found[name] = self._found.get(name, 0.0) + weight**2 * value

    def skip_step(self) -> None:
        """Forget the norms of the current step, whose gradients are discarded."""
        self._found = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._found or args.term_gradient_limit is None:
            return
        values = self.trainer.accelerator.reduce(torch.stack([*self._found.values()]), "sum").tolist()
        scales, means = self.scales, state.stateful_callbacks.get(KEY, {})
        for name, value in zip(self._found, values, strict=True):
            square = value / scales.get(name, 1.0) ** 2
            means = means | {name: _DECAY * means.get(name, square) + (1 - _DECAY) * square}
        state.stateful_callbacks[KEY] = means
        self._found = {}
