"""Test the numbers of `dwakd judge`: intervals, the length-controlled win rate, and how a reply becomes a verdict."""

import numpy as np
import pytest

from dwakd.judge.pairs import Pair
from dwakd.judge.prompts import fill, read_prompt, read_verdict
from dwakd.judge.statistics import length_controlled, score_of, summarise, wilson


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0),
        (" b.\n", 0.0),
        ("Tie", 0.5),
        ("[[C]]", 0.5),
        ("Assistant A is worse, so my verdict is [[B]].", 0.0),
        ("The verdict is: **B**", 0.0),
        ("The winner is assistant A", 1.0),
        ("<think>\nA\n</think>\n\nTied", 0.5),
        ("A\n\nThe first answer is more detailed.", 1.0),
        ("A or B", None),
        ("A good answer is short.", None),
        ("Both are bad", None),
        ("<think>A", None),
        ("Answer A shows <think> tags, which is bad. [[B]]", 0.0),
        ("<think>\nLet me compare.\nAnswer A:", None),
        ("**Answer A**:\nwrong date.\n\n**Answer B**:\nCorrect.\n\nVerdict: B", 0.0),
        ("A:\nright\n\nB:\nwrong\n\n**Verdict: A**", 1.0),
        ("I compare both.\n\n**Answer B:**", None),
        ("", None),
    ],
)
def test_replies(reply, verdict):
    """A sentence that mentions an answer is no verdict for it."""
    assert read_verdict(reply) == verdict
    if "[[" not in reply:
        assert read_verdict(reply, complete=False) is None, "the text that is missing may contain the verdict"


def test_braces_in_answers_stay():
    """An answer with {second} in it must not be replaced by the other answer."""
    filled = fill(read_prompt(None), "{first}", "{second}", "x{question}")
    assert "[Question]\n{first}\n\n[Answer of A]\n{second}\n\n[Answer of B]\nx{question}\n" in filled


def test_wilson_covers_the_true_share():
    """The interval must contain the true share in 95 % of test sets, also near 0, where a bootstrap fails."""
    rng = np.random.default_rng(0)
    for share in (0.03, 0.5, 0.9):
        found = [wilson(rng.binomial(60, share), 60) for _ in range(400)]
        assert 0.92 < np.mean([one["low"] <= 100 * share <= one["high"] for one in found]) <= 0.99
    assert wilson(0, 20)["high"] > 10


def test_length_control_removes_a_preference_for_long_answers():
    """A judge that sees only the length must give a run of long answers about 50 %, and a better run keeps its lead."""
    rng = np.random.default_rng(1)
    differences = rng.normal(60, 100, 2000).astype(int)
    length = 1.5 * np.tanh(differences / differences.std())
    for lead, expected in ((0.0, 50), (1.0, 100 / (1 + np.exp(-1)))):
        wins = rng.random(2000) < 1 / (1 + np.exp(-lead - length))
        found = length_controlled(wins.astype(float).tolist(), differences.tolist())
        assert 100 * wins.mean() > expected + 5
        assert found["low"] < expected < found["high"] < found["low"] + 8
        assert found["percent"] == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("scores", [[1.0] * 30, [0.0] * 30, [0.5], [1.0] * 15 + [0.0] * 15])
def test_length_control_stays_finite(scores):
    """A run that wins everything, and lengths that separate all verdicts, have no maximum of the likelihood."""
    found = length_controlled(scores, list(range(len(scores), 0, -1)))
    assert 0 <= found["low"] <= found["percent"] <= found["high"] <= 100
    assert all(map(np.isfinite, found.values()))
    assert length_controlled(scores, [0] * len(scores))["percent"] == pytest.approx(
        100 * (sum(scores) + 0.5) / (len(scores) + 1), abs=1e-6
    )


def test_an_answer_wins_only_if_it_wins_in_both_orders():
    """A win and a tie, or a win and a loss, are a tie; and a missing verdict is none of them."""
    pair = Pair("set", "q", ("long answer", "short"), 1)
    assert score_of(pair, [1.0, 1.0]) == 1.0
    assert score_of(pair, [1.0, 0.5]) == score_of(pair, [0.0, 1.0]) == 0.5
    assert score_of(pair, [1.0, None]) is None
    assert score_of(pair._replace(answers=("", "x")), []) == 0.0
    assert score_of(pair._replace(answers=("", "")), []) == 0.5
    numbers = summarise([(pair, [1.0, 0.0]), (pair, [1.0, 1.0]), (pair, [None, 1.0])], length_control=False)
    assert (numbers["pairs"], numbers["without_verdict"], numbers["order_dependent"]["percent"]) == (3, 1, 50)
    assert numbers["first_preferred"]["percent"] == 25, "B is first in the first order"
    assert numbers["mean_length_difference"] == 6
