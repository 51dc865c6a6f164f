"""The band around the alignment of two token sequences, outside of which DWA-KD penalises costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dwakd.losses.attention import Focus
from dwakd.losses.record import record


class Band(NamedTuple):
    """A band that contains the teacher tokens j with |j - c_i| <= w_i for each student token i (equations 19 to 22).

    Args:
        centre: c_i.
        half_width: w_i.
        penalty: lambda_band, added to the cost of each cell outside the band.
        first_index: index of the first token.
    """

    centre: Float[Tensor, "batch s_length"]
    half_width: Float[Tensor, "batch s_length"]
    penalty: float
    first_index: int

    @classmethod
    def around(
        cls,
        focus: Focus,
        student_lengths: Int[Tensor, " batch"],
        teacher_lengths: Int[Tensor, " batch"],
        *,
        base: float = 5.0,
        entropy_factor: float = 2.0,
        blend: float | Float[Tensor, "batch s_length"] = 0.7,
        penalty: float = 1.0,
        first_index: int = 1,
    ) -> Band:
        """Return the band around the attention.

        Args:
            focus: mean and entropy of the attention of equation 1.
            student_lengths: student tokens S of each example.
            teacher_lengths: teacher tokens T of each example.
            base: b, the half-width of the band without entropy.
            entropy_factor: beta, tokens of half-width per nat of the attention's entropy.
            blend: alpha, how far the centre follows the attention instead of the diagonal: one value, or one per token.
            penalty: lambda_band.
            first_index: index of the first token. 1 in the paper; 0 reproduces the published code.
        """
        rows = torch.arange(focus.centre.shape[1], device=focus.centre.device) + first_index
        slope = (teacher_lengths / student_lengths).to(focus.centre.dtype)
        diagonal = rows * slope[:, None]  # this form of the centre is exact where attention and diagonal agree
        centre = diagonal + blend * (focus.centre + first_index - diagonal)
        return cls(centre, base + entropy_factor * focus.entropy, penalty, first_index)

    def penalties(self, t_length: int) -> Float[Tensor, "batch s_length t_length"]:
        """Return the penalty of each cell."""
        everything = slice(None)
        outside = self.is_outside(everything, everything, slice(0, t_length))
        record(outside_band=outside)
        return self.penalty * outside.to(self.centre.dtype)

    def is_outside(self, example: int | slice, rows: slice, columns: slice) -> Bool[Tensor, "*batch rows columns"]:
        """Return which cells of a block are outside the band."""
        indices = torch.arange(columns.start, columns.stop, device=self.centre.device) + self.first_index
        centre, half_width = (side[example, rows, None] for side in (self.centre, self.half_width))
        return (indices.to(centre.dtype) - centre).abs() > half_width
