"""Sampling whose outcome does not depend on the batch.

`torch.multinomial` draws from one global stream whose numbers go to whatever shares the batch. Here row `i` under
seed `s` has its own stream of uniform numbers, one a token, and each token is the inverse of the cumulative
distribution at that number. So an answer depends on the model, its prompt, `s` and `i`, and not on batch size,
batch order or the number of devices (beyond the rounding of padded forwards). The global generator is left alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TopPLogitsWarper


def streams(seed: int, rows: Sequence[int], steps: int, device: torch.device) -> Float[Tensor, "batch steps"]:
    """`steps` uniform numbers in [0, 1) for each row; a longer stream begins with the shorter one."""
    numbers = np.stack([np.random.default_rng((seed, row)).random(steps) for row in rows])
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return torch.from_numpy(numbers).to(dtype).to(device)


class SeededSampling:
    """A logits processor that leaves one token possible: the one at the row's next uniform number.

    Args:
        uniforms: one number in [0, 1) per row and new token.
        prompt_length: columns of the padded prompts.
        temperature: divides the logits.
        top_p: keep the likeliest tokens that together reach this probability.
    """

    def __init__(
        self, uniforms: Float[Tensor, "batch steps"], prompt_length: int, temperature: float, top_p: float
    ) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """0 at the chosen token, minus infinity elsewhere; `scores` are the logits of the next token."""
        step = input_ids.shape[1] - self.prompt_length
        scores = scores / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        cumulative = torch.softmax(scores.to(self.uniforms.dtype), dim=-1).cumsum(dim=-1)
        threshold = self.uniforms[:, step, None] * cumulative[:, -1:]
        # the first token whose cumulative probability exceeds the threshold: never one of probability 0
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
