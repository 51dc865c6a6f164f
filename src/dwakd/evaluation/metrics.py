"""Score answers by ROUGE-L and exact match, in percent, and summarise scores over seeds and examples."""

import re
import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from dwakd.data.sources import Example
from dwakd.errors import UserError

RESAMPLES = 2000
"""Number of bootstrap resamples for an interval."""
_SCORER = RougeScorer(["rougeL"], use_stemmer=True)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def repeated_sequences(items: Sequence[Hashable], length: int = 4) -> tuple[int, int]:
    """Count the sequences of `length` consecutive items that occurred before, and all such sequences.

    Examples:
        >>> repeated_sequences("abababa")
        (2, 4)
    """
    found = list(zip(*(items[start:] for start in range(length)), strict=False))
    return len(found) - len(set(found)), len(found)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Compute the ROUGE-L of each answer: F1 of the longest common subsequence of words with its best reference, x 100.

    This is google's `rouge_score` with its Porter stemmer and its tokenizer, which keeps only a-z and 0-9, so text in
    another script scores 0 (see `is_scorable`). The protocol is that of DSKD (arXiv 2406.17328) and DWA-KD.

    Examples:
        >>> [round(score, 4) for score in rouge_l(["the cats are running"], [["the cat is running fast"]])]
        [66.6667]
    """
    pairs = zip(answers, references, strict=True)
    return [100 * float(_SCORER.score_multi(texts, answer)["rougeL"].fmeasure) for answer, texts in pairs]


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return 100 for each answer that equals one of its references after normalisation, and 0 for the others.

    Normalisation makes text lower case, removes ASCII punctuation and reduces white space. Unlike SQuAD's, it keeps
    articles.

    Examples:
        >>> exact_match(["The Nile."], [["Amazon", "the  nile"]])
        [100.0]
    """
    pairs = zip(answers, references, strict=True)
    return [100.0 if any(_is_match(answer, text) for text in texts) else 0.0 for answer, texts in pairs]


def _is_match(answer: str, reference: str) -> bool:
    """Compare two texts without case and punctuation; texts of punctuation only, such as "<=", as they are."""
    words = _normalised(answer)
    return words == _normalised(reference) and (bool(words) or answer.strip() == reference.strip())


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def references_of(example: Example) -> tuple[str, ...]:
    """Return the references of a row, or else its response; raise a UserError if it has neither."""
    if not has_reference(example):
        raise UserError(f"{example.place} has no response and no references: add one")
    return example.references or (example.response,)


def has_reference(example: Example) -> bool:
    """Return whether the row has a reference or a response to compare an answer with."""
    return example.answer is not None or any(text.strip() for text in example.references or (example.response,))


def is_scorable(references: Sequence[str]) -> bool:
    """Return whether ROUGE-L can be above 0, because some reference has a letter a-z or a digit."""
    return any(re.search("[a-z0-9]", text.lower()) for text in references)


@dataclass(frozen=True)
class Summary:
    """Summary of a metric over `n` examples, in the unit of the metric."""

    mean: float
    std: float | None
    """Sample standard deviation of the seeds' means; None for a single pass."""
    n: int
    interval: tuple[float, float]
    """95 % bootstrap interval of the mean over the examples, whose scores are their means over the seeds."""


def summarise(scores: Sequence[Sequence[float]]) -> Summary:
    """Summarise `scores[seed][example]`, with a reproducible bootstrap.

    `std` shows how much the mean varies with the sampling seed on this test set, and `interval` how much it would vary
    with another test set of the same kind.

    Raises:
        UserError: there are no scores, or the seeds have different numbers of examples.
    """
    sizes = [len(row) for row in scores]
    if len(set(sizes)) != 1 or not all(sizes):
        raise UserError(f"scores must have the same number of examples, at least one, for every seed, got {sizes}")
    table = np.asarray(scores, dtype=np.float64)
    values = table.mean(axis=0)
    rng = np.random.default_rng(0)
    # one resample at a time needs the memory of one test set only
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    std = float(table.mean(axis=1).std(ddof=1)) if len(table) > 1 else None
    return Summary(float(table.mean()), std, len(values), (float(low), float(high)))
