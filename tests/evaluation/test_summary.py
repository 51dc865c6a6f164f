"""The mean, the spread over seeds and the interval over examples."""

import numpy as np
import pytest

from dwakd.errors import UserError
from dwakd.evaluation.summary import summarise


def test_by_hand() -> None:
    """The spread is that of the seeds' means; that of single scores would hide how stable the mean is."""
    summary = summarise([[0.0, 10.0], [20.0, 30.0], [10.0, 20.0]])
    assert summary.mean == pytest.approx(15.0)
    assert summary.std == pytest.approx(10.0)
    assert summary.n == 2
    assert summary.interval == (pytest.approx(10.0), pytest.approx(20.0))


def test_one_pass_has_no_spread() -> None:
    """A greedy pass must not claim a spread of 0."""
    assert summarise([[1.0, 2.0, 3.0]]).std is None


def test_interval_has_the_right_width() -> None:
    """Too narrow an interval declares a chance difference a success: 1.96 standard errors on either side."""
    values = np.random.default_rng(1).normal(40.0, 10.0, size=400)
    low, high = summarise([values.tolist()]).interval
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_averages_the_seeds_first() -> None:
    """Treating seeds as examples would shrink the interval by more seeds, with no more test data."""
    values = np.random.default_rng(2).normal(40.0, 10.0, size=100).tolist()
    assert summarise([values] * 5).interval == pytest.approx(summarise([values]).interval)


def test_same_scores_same_interval() -> None:
    """Two reports of one evaluation must not differ."""
    scores = [np.random.default_rng(3).random(50).tolist()]
    assert summarise(scores) == summarise(scores)


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_uneven_scores_are_refused(scores: list[list[float]]) -> None:
    """A mean over ragged seeds would weigh rows unevenly, one over nothing is NaN."""
    with pytest.raises(UserError, match="every seed"):
        summarise(scores)
