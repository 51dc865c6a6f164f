"""Summarise scores: mean, standard deviation over the seeds and bootstrap interval over the examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dwakd.errors import UserError

RESAMPLES = 2000
"""Number of bootstrap resamples for an interval."""

_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Summary:
    """Summary of a metric over a test set, in the unit of the metric.

    Args:
        mean: mean over the seeds of the mean over the examples.
        std: sample standard deviation of the seeds' means; None for a single pass.
        n: number of examples.
        interval: 95 % bootstrap interval of the mean over the examples. The score of an example is its mean over the
            seeds.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float]


def summarise(scores: Sequence[Sequence[float]]) -> Summary:
    """Summarise `scores[seed][example]`.

    `std` shows how much the mean varies with the sampling seed on this test set. `interval` shows how much it would
    vary with another test set of the same kind. The bootstrap has a fixed seed, so the interval is reproducible.

    Raises:
        UserError: there are no scores, or the seeds have different numbers of examples.
    """
    if not scores or not all(scores) or len({len(row) for row in scores}) > 1:
        sizes = [len(row) for row in scores]
        raise UserError(f"scores must have the same number of examples, at least one, for every seed, got {sizes}")
    table = np.asarray(scores, dtype=np.float64)
    num_seeds, num_examples = table.shape
    std = float(table.mean(axis=1).std(ddof=1)) if num_seeds > 1 else None
    return Summary(float(table.mean()), std, num_examples, _bootstrap_interval(table.mean(axis=0)))


def _bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Compute the percentile interval of the mean by resampling with replacement."""
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    # one resample at a time needs the memory of one test set only
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
