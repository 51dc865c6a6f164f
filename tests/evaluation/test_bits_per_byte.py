"""Test that bits per byte equal sums computed by hand."""

import logging
import math
from typing import Any

import pytest
import torch

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.evaluation.bits_per_byte import bits_per_byte, calibration_gaps, text_encoder
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model, wordpiece
from tests.data.chat import with_bos

VOCAB = 420
EXAMPLES = [
    Example(0, "Name three colours.", response="Red, green and blue."),
    Example(1, "Hi", response="Ça va bien 😀"),
    Example(2, "Which is larger, 12 or 7?", response="12"),
]
NUM_BYTES = sum(len(example.response.encode()) for example in EXAMPLES)
TOKENIZERS = {"byte_bpe": byte_bpe, "bpe_byte_fallback": bpe_byte_fallback, "wordpiece": wordpiece}


def bits_by_hand(model: Any, encoder: TextEncoder, example: Example) -> float:
    """Compute the bits of one row from the model's own logits, without mask and padding."""
    prompt = encoder.prompt_ids(example)
    response = [*encoder.response_ids(example.response)[0], encoder.end_token_id]
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(dim=-1)
    return -sum(float(log_probs[len(prompt) + k - 1, token]) for k, token in enumerate(response)) / math.log(2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "cohere"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_equals_the_sum_by_hand(family: str, kind: str) -> None:
    """The value equals the sum by hand: without prompt tokens, with the end token, for every head."""
    model, encoder = tiny_model(family, VOCAB), TextEncoder(TOKENIZERS[kind](), "plain")
    result = bits_per_byte(model, encoder, EXAMPLES, batch_size=2)
    assert result.bits == pytest.approx(sum(bits_by_hand(model, encoder, example) for example in EXAMPLES), rel=1e-5)
    assert result.bytes == NUM_BYTES
    assert result.value == pytest.approx(result.bits / NUM_BYTES)
    assert (result.num_examples, result.num_truncated) == (3, 0)


def test_uniform_model() -> None:
    """A model with equal logits needs log2 of its vocabulary for each token, including the end token."""
    model, encoder = tiny_model("llama", VOCAB), TextEncoder(byte_bpe(), "plain")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    num_tokens = sum(len(encoder.response_ids(example.response)[0]) + 1 for example in EXAMPLES)
    result = bits_per_byte(model, encoder, EXAMPLES)
    assert result.value == pytest.approx(math.log2(VOCAB) * num_tokens / NUM_BYTES, rel=1e-6)


def test_calibration_error_by_hand() -> None:
    """Bins that are closed on the wrong side or weighted by bin would give another error than the published ones."""
    confidence = torch.tensor([1 / 15, 0.07, 0.5, 0.52, 0.97, 1.0, 0.94], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False, True, True, False])
    gaps = calibration_gaps(confidence, correct)
    expected = torch.zeros(15, dtype=torch.float64)
    expected[0], expected[1] = 1 / 15 - 1, 0.07  # 1/15 belongs to the first bin, 0.07 to the second
    expected[7] = 0.5 + 0.52 - 1  # from 7/15 to 8/15
    expected[14] = 0.97 + 1 + 0.94 - 2
    torch.testing.assert_close(gaps, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_calibration_error_of_a_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Confidences must come from the same positions and logits as the bits, whatever the batch and the slices."""
    model, encoder = tiny_model(family, VOCAB, tie_word_embeddings=False), TextEncoder(byte_bpe(), "plain")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # confidences that fill several bins
    tops, hits = [], []
    for example in EXAMPLES:
        prompt = encoder.prompt_ids(example)
        response = [*encoder.response_ids(example.response)[0], encoder.end_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        top, token = logits.softmax(dim=-1).max(dim=-1)
        tops += top.tolist()
        hits += (token == torch.tensor(response)).tolist()
    bins = [math.ceil(15 * top) for top in tops]
    gaps = [sum(t - h for t, h, b in zip(tops, hits, bins, strict=True) if b == m) for m in range(1, 16)]
    assert sum(gap != 0 for gap in gaps) > 3
    expected = 100 * sum(map(abs, gaps)) / len(tops)
    result = bits_per_byte(model, encoder, EXAMPLES, batch_size=3)
    assert result.ece == pytest.approx(expected, rel=1e-4)
    lengths = [len(encoder.response_ids(example.response)[0]) + 1 for example in EXAMPLES]
    assert [row[-1] for row in result.row_gaps] == lengths
    last = slice(lengths[0] + lengths[1], None)  # the bits of the rows are in their order, and so must be the gaps
    assert sum(result.row_gaps[2][:-1]) == pytest.approx(sum(tops[last]) - sum(hits[last]), rel=1e-4)
    assert sum(row[0] for row in result.row_gaps) == pytest.approx(gaps[0], rel=1e-4, abs=1e-6)
    monkeypatch.setattr("dwakd.evaluation.bits_per_byte.LOGITS_AT_ONCE", 3 * VOCAB)
    assert bits_per_byte(model, encoder, EXAMPLES, batch_size=1).ece == pytest.approx(expected, rel=1e-4)


def test_batches_and_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value does not depend on the batch size."""
    model, encoder = tiny_model("gpt2", VOCAB), TextEncoder(byte_bpe(), "plain")
    one = bits_per_byte(model, encoder, EXAMPLES, batch_size=1)
    assert bits_per_byte(model, encoder, EXAMPLES[::-1], batch_size=3).bits == pytest.approx(one.bits, rel=1e-6)
    monkeypatch.setattr("dwakd.evaluation.bits_per_byte.LOGITS_AT_ONCE", 3 * VOCAB)
    assert bits_per_byte(model, encoder, EXAMPLES, batch_size=3).bits == pytest.approx(one.bits, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "kind", "begins"), [("gpt2", "byte_bpe", "eos"), ("llama", "bpe_byte_fallback", "bos")]
)
def test_text_without_a_prompt(family: str, kind: str, begins: str) -> None:
    """The first token of a text needs a context, which must not be a template or a guess that favours one model."""
    tokenizer, model = TOKENIZERS[kind](), tiny_model(family, VOCAB)
    if begins == "bos":
        tokenizer = with_bos(tokenizer)
    encoder = text_encoder(tokenizer)
    texts = [Example(0, "", response="Red, {green} and blue."), Example(1, "", response="Ça va bien 😀")]
    first = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}[begins]
    assert [encoder.prompt_ids(text) for text in texts] == [[first]] * 2
    result = bits_per_byte(model, encoder, texts)
    assert result.bits == pytest.approx(sum(bits_by_hand(model, encoder, text) for text in texts), rel=1e-5)
    assert result.bytes == sum(len(text.response.encode()) for text in texts)


def test_truncated_responses_are_counted() -> None:
    """The value of a truncated response is divided by the bytes of its remaining part."""
    model, encoder = tiny_model("gpt2", VOCAB), TextEncoder(byte_bpe(), "plain")
    prompt = len(encoder.prompt_ids(EXAMPLES[0]))
    result = bits_per_byte(model, encoder, EXAMPLES[:1], max_length=prompt + 4)
    ids, ends = encoder.response_ids(EXAMPLES[0].response)
    assert len(ids) > 4
    assert (result.num_examples, result.num_truncated, result.bytes) == (1, 1, ends[3])


def test_rows_without_a_response_are_left_out() -> None:
    """Rows that have only references are left out."""
    model, encoder = tiny_model("gpt2", VOCAB), TextEncoder(byte_bpe(), "plain")
    asked = Example(3, "Hello?", references=("Hi", "Hello"))
    assert bits_per_byte(model, encoder, [*EXAMPLES, asked]).num_examples == 3
    assert bits_per_byte(model, encoder, [asked]) is None


def test_model_is_left_as_it_was() -> None:
    """The train or eval mode of the model is restored."""
    model, encoder = tiny_model("gpt2", VOCAB, resid_pdrop=0.5), TextEncoder(byte_bpe(), "plain")
    value = bits_per_byte(model, encoder, EXAMPLES).value
    assert bits_per_byte(model.train(), encoder, EXAMPLES).value == value, "no dropout in an evaluation"
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_model_with_few_positions_cuts_like_max_length(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Responses are truncated at the model's last position, beyond which models fail or give wrong values."""
    positions = 48
    encoder = TextEncoder(byte_bpe(), "plain")
    model = tiny_model(family, VOCAB, **{"n_positions" if family == "gpt2" else "max_position_embeddings": positions})
    long = Example(0, "Count.", response=" ".join(map(str, range(100))))
    result = bits_per_byte(model, encoder, [long], max_length=512)
    assert result == bits_per_byte(model, encoder, [long], max_length=positions)
    assert result.num_truncated == 1
    endless = Example(0, "Count to a hundred. " * 20, response="1")
    with caplog.at_level(logging.WARNING, logger="dwakd.evaluation.bits_per_byte"):
        assert bits_per_byte(model, encoder, [long, endless]) == result
        assert bits_per_byte(model, encoder, [endless]) is None
    for count in (2, 1):
        assert f"1 of {count} rows: their prompts fill {positions} tokens" in caplog.text
