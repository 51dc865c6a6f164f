"""Test ROUGE-L, exact match and their summaries."""

import numpy as np
import pytest

from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.metrics import exact_match, is_scorable, references_of, rouge_l, summarise


def test_stemmed_vector() -> None:
    """ROUGE-L uses a stemmer, as the published scores do."""
    assert rouge_l(["the cats are running"], [["the cat is running fast"]]) == [pytest.approx(66.6667, abs=1e-4)]


def test_f_measure_by_hand() -> None:
    """The score equals the F1 computed by hand: a common subsequence of 2 words, of 3 in the answer and 5 in the reference."""
    assert rouge_l(["a b c"], [["a x b y z"]]) == [pytest.approx(100 * 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))]


def test_best_reference_counts() -> None:
    """The score is that of the best reference."""
    scores = rouge_l(["red green", "blue"], [["yellow", "red green", "red"], ["blue sky", "grey"]])
    assert scores == [pytest.approx(100.0), pytest.approx(200 / 3)]


def test_nothing_to_compare_scores_zero() -> None:
    """An empty answer has the score 0."""
    assert rouge_l(["", "  ", "...", "word"], [["a word"], ["a word"], ["a word"], ["..."]]) == [0, 0, 0, 0]
    assert exact_match(["", "word"], [["a word"], [""]]) == [0, 0]


def test_other_scripts_are_not_scored() -> None:
    """Only a to z and digits are compared, as in the published protocol."""
    assert rouge_l(["Ответ 12", "Ответ"], [["Ответ 12"], ["Ответ"]]) == [pytest.approx(100.0), 0.0]
    assert is_scorable(["Ответ", "Ответ 12"])
    assert not is_scorable(["Ответ", "答案。"])


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The Nile.", "the  nile", 100.0),
        ("it's\n12!", "its 12", 100.0),
        ("Nile", "the Nile", 0.0),
        ("Ответ", "ответ!", 100.0),
        ("<=", ">=", 0.0),
        (" <= ", "<=", 100.0),
        ("", "?", 0.0),
    ],
)
def test_exact_match_normalises(answer: str, reference: str, score: float) -> None:
    """Case, ASCII punctuation and spaces are ignored, except in texts without words; articles are not."""
    assert exact_match([answer], [["other", reference]]) == [score]


def test_every_answer_needs_its_references() -> None:
    """Answers and references of different numbers raise an error."""
    with pytest.raises(ValueError, match="shorter"):
        rouge_l(["a", "b"], [["a"]])


def test_references_of_a_row() -> None:
    """A row without response and references raises an error."""
    assert references_of(Example(0, "q", response="one")) == ("one",)
    assert references_of(Example(0, "q", response="one", references=("one", "two"))) == ("one", "two")
    with pytest.raises(UserError, match="row 7"):
        references_of(Example(7, "q"))


def test_summary_by_hand() -> None:
    """The standard deviation is that of the seeds' means, not that of single scores."""
    summary = summarise([[0.0, 10.0], [20.0, 30.0], [10.0, 20.0]])
    assert summary.mean == pytest.approx(15.0)
    assert summary.std == pytest.approx(10.0)
    assert summary.n == 2
    assert summary.interval == (pytest.approx(10.0), pytest.approx(20.0))


def test_one_pass_has_no_spread() -> None:
    """The standard deviation of a single pass is unknown, not 0."""
    assert summarise([[1.0, 2.0, 3.0]]).std is None


def test_interval_has_the_right_width() -> None:
    """The interval extends about 1.96 standard errors to each side."""
    values = np.random.default_rng(1).normal(40.0, 10.0, size=400)
    low, high = summarise([values.tolist()]).interval
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_averages_the_seeds_first() -> None:
    """The interval does not become narrower with more seeds of the same rows."""
    values = np.random.default_rng(2).normal(40.0, 10.0, size=100).tolist()
    assert summarise([values] * 5).interval == pytest.approx(summarise([values]).interval)


def test_same_scores_same_interval() -> None:
    """Two summaries of the same scores are equal."""
    scores = [np.random.default_rng(3).random(50).tolist()]
    assert summarise(scores) == summarise(scores)


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_uneven_scores_are_refused(scores: list[list[float]]) -> None:
    """Seeds with different numbers of scores, or none, are refused."""
    with pytest.raises(UserError, match="every seed"):
        summarise(scores)
