"""Sample tokens independently of the batch.

`torch.multinomial` draws all rows of a batch from one global stream, so that the result depends on the batch. Here
every row `i` has its own stream of uniform numbers for a seed `s`, with one number for each token. The token is the
inverse of the cumulative distribution at that number. An answer therefore depends on the model, its prompt, `s` and
`i`. Apart from rounding in padded forward passes, it does not depend on the batch size, the order of the batches or
the number of devices. The global random generator is not used.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TopPLogitsWarper


def streams(seed: int, rows: Sequence[int], steps: int, device: torch.device) -> Float[Tensor, "batch steps"]:
    """Draw `steps` uniform numbers in [0, 1) for each row; more steps only append numbers."""
    numbers = np.stack([np.random.default_rng((seed, row)).random(steps) for row in rows])
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return torch.from_numpy(numbers).to(dtype).to(device)


class SeededSampling:
    """Logits processor that leaves only the token which the row's next uniform number selects.

    Args:
        uniforms: one number in [0, 1) for each row and new token.
        prompt_length: length of the padded prompts.
        temperature: divides the logits; above 0.
        top_p: sample from the likeliest tokens that together reach this probability.
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
        """Return 0 for the chosen token and minus infinity for the others; `scores` are the next token's logits."""
        step = input_ids.shape[1] - self.prompt_length
        scores = scores / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        cumulative = torch.softmax(scores.to(self.uniforms.dtype), dim=-1).cumsum(dim=-1)
        threshold = self.uniforms[:, step, None] * cumulative[:, -1:]
        # the first token whose cumulative probability exceeds the threshold, so never a token of probability 0
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
