"""The words of the demo's corpus are unambiguous."""

from itertools import pairwise

from dwakd.tools.demo import lexicon


def test_lexicon_words_are_unambiguous() -> None:
    """A word with two opposites, kinds or genders would make a correct answer wrong."""
    assert not set(lexicon.WOMEN) & set(lexicon.MEN)
    for table in (lexicon.OPPOSITES, lexicon.MOODS):
        words = [*table, *table.values()]
        assert len(set(words)) == len(words)
    items = [item for items in lexicon.KINDS.values() for item in items]
    assert len(set(items)) == len(items)
    assert all(first[0] < second[0] for first, second in pairwise(lexicon.WORDS))
