"""Standard deviations of a teacher's tensors over an optimiser batch, for N(x) = x / std(x) of DSKD and DWA-KD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.environment import widest_float

_BLOCK = 1 << 14  # teacher tokens whose statistics are computed at once, in float64


@dataclass(frozen=True)
class TeacherScale:
    """Statistics for the normalisation N(x) = x / std(x) of three teacher tensors, which can be merged over batches.

    Args:
        moments: number of values, mean and sum of squared deviations of each of the tensors: keys [e_j ; e_{j+1}], hidden
            states h_j and target embeddings e_{j+1}.
    """

    moments: Float[Tensor, "3 3"]

    @classmethod
    def of(cls, teacher: ModelSide) -> TeacherScale:
        """Compute the statistics of the three tensors over all response positions of one batch."""
        parts = teacher.input_embeddings, teacher.target_embeddings, teacher.hidden
        blocks = zip(*(torch.split(part.detach(), _BLOCK) for part in parts), strict=True)
        found = [cls._of_block(*block) for block in blocks]
        return found[0] if len(found) == 1 else cls.merge(found)

    @classmethod
    def _of_block(cls, inputs: Tensor, targets: Tensor, hidden: Tensor) -> TeacherScale:
        rows = []
        for part in (torch.cat([inputs, targets], -1), hidden, targets):
            values = part.to(widest_float(part.device))
            mean = values.mean()
            rows.append(torch.stack([mean.new_tensor(values.numel()), mean, (values - mean).square().sum()]))
        return cls(torch.stack(rows))

    @staticmethod
    def merge(scales: list[TeacherScale]) -> TeacherScale:
        """Merge the statistics of several batches (Chan's parallel update)."""
        counts, means, deviations = torch.stack([scale.moments for scale in scales]).unbind(-1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total.clamp_min(1)
        squares = deviations.sum(0) + (counts * (means - mean).square()).sum(0)
        return TeacherScale(torch.stack([total, mean, squares], -1))

    @property
    def std(self) -> Float[Tensor, "3"]:
        """Standard deviations with Bessel's correction; 1 for a constant tensor."""
        count, _, squares = self.moments.unbind(-1)
        std = (squares / (count - 1).clamp_min(1)).sqrt()
        return torch.where(std > 0, std, 1.0)
