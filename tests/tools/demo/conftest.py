"""One corpus and its tokenizers for all tests of the demo."""

import pytest
from transformers import PreTrainedTokenizerFast

from dwakd.tools.demo.corpus import make_corpus
from dwakd.tools.demo.tokenizers import demo_tokenizers
from tests.tools.demo.builders import NUM_TEST, NUM_TRAIN, Splits


@pytest.fixture(scope="package")
def splits() -> Splits:
    return make_corpus(NUM_TRAIN, NUM_TEST, seed=3)


@pytest.fixture(scope="package")
def texts(splits: Splits) -> list[str]:
    return [text for split in splits for row in split for text in (row.instruction, row.response)]


@pytest.fixture(scope="package")
def tokenizers(texts: list[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    return demo_tokenizers(texts)
