"""Win, tie and loss of A against B with intervals, and the win rate for answers of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from dwakd.judge.pairs import Pair

_Z = 1.959964  # of a 95 % interval
_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def wilson(successes: float, total: int) -> dict[str, float | None]:
    """Compute a share in percent with Wilson's 95 % interval; None without any observation.

    A tie is half a success of a win rate, whose interval is then wider than necessary.

    Examples:
        >>> {name: round(value, 1) for name, value in wilson(8, 10).items()}
        {'percent': 80.0, 'low': 49.0, 'high': 94.3}
    """
    if not total:
        return dict.fromkeys(("percent", "low", "high"))
    share, spread = successes / total, _Z**2 / total
    middle, half = share + spread / 2, sqrt(spread * share * (1 - share) + spread**2 / 4)
    low, high = (100 * (middle + side * half) / (1 + spread) for side in (-1, 1))
    return {"percent": 100 * share, "low": max(low, 0.0), "high": min(high, 100.0)}


def length_controlled(scores: Sequence[float], differences: Sequence[int]) -> dict[str, float]:
    """Estimate the win rate of A in percent if its answers were as long as B's, with a 95 % interval (Wald).

        P(A wins) = sigmoid(theta + phi tanh(d / std(d))),  d = length of A - length of B in characters

    is fitted to the scores (1, 0.5 or 0), and the estimate is sigmoid(theta). This is the length term of AlpacaEval 2
    (Dubois et al. 2024, arXiv 2404.04475); its term for the difficulty of a prompt needs verdicts on many models. The
    penalty phi^2 / 2 and one additional tie at d = 0 keep the estimate finite if A wins everything.
    """
    scale = np.std(differences) or 1.0
    design = np.array([*((1, np.tanh(d / scale)) for d in differences), (1, 0)])
    wins, penalty, weights = np.array([*scores, 0.5]), np.diag([0.0, 1.0]), np.zeros(2)
    for _ in range(100):
        chances = 1 / (1 + np.exp(-design @ weights))
        hessian = design.T @ (design * (chances * (1 - chances))[:, None]) + penalty
        step = np.linalg.solve(hessian, design.T @ (wins - chances) - penalty @ weights)
        weights += step / max(1.0, np.abs(step).max())  # Newton's method with steps of at most 1
    error = _Z * sqrt(np.linalg.inv(hessian)[0, 0])
    ends = {"percent": 0.0, "low": -error, "high": error}
    return {name: float(100 / (1 + np.exp(-weights[0] - end))) for name, end in ends.items()}


def score_of(pair: Pair, votes: Sequence[float | None]) -> float | None:
    """Return 1 if A wins, 0.5 for a tie, 0 if B wins, and None if a vote has no verdict.

    `votes` are such scores. An answer wins only if it wins every vote. Without votes, an empty answer loses.
    """
    if not votes:
        return 0.5 + (bool(pair.answers[0]) - bool(pair.answers[1])) / 2
    return None if None in votes else votes[0] if len(set(votes)) == 1 else 0.5


def summarise(rated: Sequence[tuple[Pair, Sequence[float | None]]], *, length_control: bool) -> dict[str, Any]:
    """Compute the numbers of judge.json from pairs and their votes: the scores of A, that in the order `first` first."""
    known = [(score, pair, votes) for pair, votes in rated if (score := score_of(pair, votes)) is not None]
    scores, n = [score for score, _, _ in known], len(known)
    differences = [len(pair.answers[0]) - len(pair.answers[1]) for _, pair, _ in known]
    first = [
        vote != (pair.first ^ place) for _, pair, votes in known for place, vote in enumerate(votes) if vote != 0.5
    ]
    twice = [len(set(votes)) > 1 for _, _, votes in known if len(votes) > 1]
    result = {
        "pairs": len(rated),
        "without_verdict": len(rated) - n,
        "without_request": sum(not votes for _, votes in rated),
        **{key: {"count": scores.count(score), **wilson(scores.count(score), n)} for key, score in _SCORES.items()},
        "win_rate": wilson(sum(scores), n),
        "length_controlled_win_rate": length_controlled(scores, differences) if length_control and n else None,
        "order_dependent": wilson(sum(twice), len(twice)) if twice else None,
        "first_preferred": wilson(sum(first), len(first)),
        "mean_length_difference": sum(differences) / max(n, 1),
    }
    return {name: value for name, value in result.items() if value is not None}
