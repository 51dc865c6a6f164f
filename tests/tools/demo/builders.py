"""Sizes of the corpus that the tests of the demo share."""

from dwakd.data.sources import Example

Splits = tuple[list[Example], list[Example]]
NUM_TRAIN, NUM_TEST = 3400, 340
