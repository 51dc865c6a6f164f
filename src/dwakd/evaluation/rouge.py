"""Compute ROUGE-L and exact match against the best of several references, in percent."""

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from dwakd.data.sources import Example
from dwakd.errors import UserError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Compute the ROUGE-L of each answer: F1 of the longest common subsequence of words with its best reference, x 100.

    This is google's `rouge_score` with its Porter stemmer and its own tokenizer, whose words consist of a-z and 0-9.
    The tokenizer drops every other character, so text in another script scores 0 (see `is_scorable`).

    Args:
        answers: one text per example; an empty one scores 0.
        references: one or more texts per example.

    Returns:
        One score per answer, 0 to 100.

    References:
        Lin 2004, ROUGE. The protocol is that of DSKD (arXiv 2406.17328) and DWA-KD (arXiv 2602.21669).

    Examples:
        >>> [round(score, 4) for score in rouge_l(["the cats are running"], [["the cat is running fast"]])]
        [66.6667]
    """
    pairs = zip(answers, references, strict=True)
    return [100 * float(_scorer().score_multi(texts, answer)["rougeL"].fmeasure) for answer, texts in pairs]


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return 100 for each answer that equals one of its references after normalisation, and 0 for the others.

    Normalisation makes text lower case, removes ASCII punctuation, replaces runs of white space by one space and
    strips the ends. It keeps articles, which SQuAD's normalisation removes, and the punctuation of other scripts.

    Examples:
        >>> exact_match(["The Nile."], [["Amazon", "the  nile"]])
        [100.0]
    """
    return [
        100.0 if _normalised(answer) in map(_normalised, texts) else 0.0
        for answer, texts in zip(answers, references, strict=True)
    ]


def references_of(example: Example) -> tuple[str, ...]:
    """Return the texts that an answer is compared with: the references of the row, or else its response.

    Raises:
        UserError: the row has neither.
    """
    references = example.references or (example.response,)
    if not has_reference(example):
        raise UserError(f"row {example.index} (counting from 0) has no response and no references: add one")
    return references


def has_reference(example: Example) -> bool:
    """Return whether the row has a reference or a response to compare an answer with."""
    return any(text.strip() for text in example.references or (example.response,))


def is_scorable(references: Sequence[str]) -> bool:
    """Return whether ROUGE-L can be above 0, because some reference has a word of a-z or 0-9."""
    return any(_tokenizer().tokenize(text) for text in references)


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@cache
def _scorer() -> Any:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _tokenizer() -> Any:
    return DefaultTokenizer(use_stemmer=False)
