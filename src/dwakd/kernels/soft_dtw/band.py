"""Choose the band of a Soft-DTW table, check it, and measure how much of the alignment reaches its border."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROWS = 64  # most rows with the same start, so that the costs of these rows are one matrix product


def rows_per_block(n: int, m: int, width: int) -> int:
    """Return how many consecutive rows of a band have the same start: fewer in a narrow or steep band."""
    return max(1, min(_ROWS, width * n // (8 * m)))


def band_starts(centre: Float[Tensor, " n"], m: int, width: int) -> Int[Tensor, " n"] | None:
    """Return the first column of each row of a band around `centre`, on the CPU; None if no such band exists.

    The band contains the first and the last cell of the table. Its starts do not decrease, and each row has a column in
    common with the next row. Where the centre decreases, the band takes the mean of the largest centre before and the
    smallest centre after. No band exists if `width` is too small to reach the last column in n rows.

    Args:
        centre: column in the middle of each row, from 0.
        m: columns of the table.
        width: columns of the band. The starts are 0 if it covers all columns.
    """
    n = len(centre)
    rows = rows_per_block(n, m, width)
    blocks = torch.nn.functional.pad(centre.detach().cpu().double()[None], (0, -n % rows), mode="replicate")
    middle = blocks.reshape(-1, rows).mean(1)
    middle = (middle.cummax(0).values + middle.flip(0).cummin(0).values.flip(0)) / 2
    last, step = max(m - width, 0), width - 1  # largest start, and largest difference between two starts
    reach = torch.arange(len(middle)) * step
    if reach[-1] < last:
        return None
    starts = (middle - (width - 1) / 2).round().long().clamp(0, last)
    starts = torch.minimum(torch.maximum(starts, last - reach.flip(0)), reach)
    starts = (starts - reach).cummin(0).values + reach
    return starts.repeat_interleave(rows)[:n]


def require_band(
    starts: Int[Tensor, "batch n"], x_lengths: Int[Tensor, " batch"], y_lengths: Int[Tensor, " batch"], width: int
) -> None:
    """Raise ValueError unless each path from the first to the last cell can stay inside the band of its example."""
    rows = torch.arange(starts.shape[1], device=starts.device)
    steps = starts.diff(dim=1)
    ends = starts.gather(1, x_lengths[:, None].long() - 1)[:, 0]
    is_band = (starts[:, 0] == 0) & (ends < y_lengths) & (ends + width >= y_lengths)
    is_band &= ((steps >= 0) & (steps < width) | (rows[1:] >= x_lengths[:, None])).all(1)
    if not is_band.all():
        raise ValueError(
            f"soft_dtw: starts[{int(is_band.int().argmin())}] must begin with 0, increase by 0 to {width - 1} from row to "
            "row, and end where the last row contains the last column"
        )


def border_mass(
    alignment: Float[Tensor, "batch n width"], starts: Int[Tensor, "batch n"], y_lengths: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Compute how much of the expected alignment lies on the border of the band: the largest sum of a row.

    A cell lies on the border if the cell on its left or right, above or below belongs to the table but not to the band. The
    sum over such cells of a row is an upper bound of the probability that a path reaches the border in this row. It is 0
    if the band covers the table.
    """
    width = alignment.shape[2]
    steps = torch.nn.functional.pad(starts.diff(dim=1), (1, 1))
    left = torch.maximum(steps[:, 1:], (starts > 0).long())
    right = torch.maximum(steps[:, :-1], (starts + width < y_lengths[:, None]).long())
    most = int(torch.maximum(left, right).max())
    cells = torch.arange(most, device=alignment.device)
    mass = (alignment[:, :, :most] * (cells < left[..., None])).sum(-1)
    mass += (alignment[:, :, width - most :] * (cells >= most - right[..., None])).sum(-1)
    return mass.amax(1)
