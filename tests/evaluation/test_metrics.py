"""ROUGE-L and exact match as the published evaluation computes them; mean, spread over seeds, interval over examples."""

import numpy as np
import pytest

from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.metrics import exact_match, is_scorable, references_of, rouge_l, summarise


def test_stemmed_vector() -> None:
    """Without the stemmer this pair has 44.4, and no number could be compared with a published one."""
    assert rouge_l(["the cats are running"], [["the cat is running fast"]]) == [pytest.approx(66.6667, abs=1e-4)]


def test_f_measure_by_hand() -> None:
    """Precision and recall would rank long and short answers differently: LCS 2 of 3 and of 5 words."""
    assert rouge_l(["a b c"], [["a x b y z"]]) == [pytest.approx(100 * 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))]


def test_best_reference_counts() -> None:
    """Taking the first or the mean would punish S-NI, where a third of the rows have several references."""
    scores = rouge_l(["red green", "blue"], [["yellow", "red green", "red"], ["blue sky", "grey"]])
    assert scores == [pytest.approx(100.0), pytest.approx(200 / 3)]


def test_nothing_to_compare_scores_zero() -> None:
    """An empty answer must lower the mean, not stop the evaluation or count as a match."""
    assert rouge_l(["", "  ", "...", "word"], [["a word"], ["a word"], ["a word"], ["..."]]) == [0, 0, 0, 0]
    assert exact_match(["", "word"], [["a word"], [""]]) == [0, 0]


def test_other_scripts_are_not_scored() -> None:
    """The protocol's tokenizer keeps a-z and 0-9; a different one would give incomparable numbers unasked."""
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
    ],
)
def test_exact_match_normalises(answer: str, reference: str, score: float) -> None:
    """Case, ASCII punctuation and spacing are no mistakes; a missing article is one."""
    assert exact_match([answer], [["other", reference]]) == [score]


def test_every_answer_needs_its_references() -> None:
    """A list that is one short would pair answers with the wrong rows."""
    with pytest.raises(ValueError, match="shorter"):
        rouge_l(["a", "b"], [["a"]])


def test_references_of_a_row() -> None:
    """A row without anything to compare with would silently score 0."""
    assert references_of(Example(0, "q", response="one")) == ("one",)
    assert references_of(Example(0, "q", response="one", references=("one", "two"))) == ("one", "two")
    with pytest.raises(UserError, match="row 7"):
        references_of(Example(7, "q"))


def test_summary_by_hand() -> None:
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
