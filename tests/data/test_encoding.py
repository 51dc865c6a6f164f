"""Test token ids and byte ends for every kind of tokenizer and many scripts."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dwakd.cache.fingerprint import fingerprint
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.data.templates import TEMPLATES
from dwakd.errors import UserError
from dwakd.recipe.recipe import recipe_from_dict
from dwakd.training.run import training_config
from tests.builders import bpe_byte_fallback, byte_bpe, unigram_byte_fallback, wordpiece
from tests.data.chat import chatml, gemma_like, with_bos
from tests.data.test_token_bytes import roberta_like
from tests.training.builders import trainer

SNIPPETS = [
    "The quick", " brown", "  ", "\n\n", "\t", "\r\n", "e\u0301", "a\u0308\u0323", "Ça", "你好", "Привет", "ไทยกำ",
    "हिन्दी", "עִבְרִית", "العربية", "가각", "\u1100\u1161\u11a8", "😀", "👩‍👩‍👧", "🇩🇪", "\u200b", "\x00", "ﬁ", "½",
    "\u212b", "▁", "</s>", "<0x41>", "<|endoftext|>", "##s", "\ufffd", "\U0010ffff",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=8).map("".join)


def nfc_byte_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Qwen's: byte-level BPE after NFC normalisation."""
    tokenizer = byte_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def nfkc_unigram() -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's: SentencePiece after NFKC normalisation."""
    tokenizer = unigram_byte_fallback()
    layout = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), layout])
    return tokenizer


def metaspace_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer like newer Llama tokenizers: the pre-tokenizer writes `▁`, but not before a space."""
    tokenizer = bpe_byte_fallback()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def uncased_wordpiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer like uncased BERT's, which drops case, accents, control characters and white space."""
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    return tokenizer


def gemma_unigram() -> PreTrainedTokenizerFast:
    return unigram_byte_fallback(prefix_space=False)


SPELLING = [byte_bpe, unigram_byte_fallback, gemma_unigram, bpe_byte_fallback, metaspace_bpe]
ALL = [*SPELLING, nfc_byte_bpe, nfkc_unigram, wordpiece, uncased_wordpiece]

FORMAT = "<|im_start|>user\n{instruction}<|im_end|>{input}"
ENDS = {byte_bpe: "<|endoftext|>", bpe_byte_fallback: "</s>", wordpiece: "[EOS]", roberta_like: "<|endoftext|>"}


@cache
def encoder(build: Callable[[], PreTrainedTokenizerFast]) -> TextEncoder:
    return TextEncoder(build(), "plain")


@pytest.mark.parametrize("build", ALL)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="")
def test_ends_cover_the_text_once_in_order(build: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    """The ends of tokens never decrease, and the last one is the length of the text."""
    ids, ends = encoder(build).response_ids(text)
    assert len(ids) == len(ends)
    offsets = [end for end in ends if end >= 0]  # the others lie in text that normalisation changed
    assert offsets == sorted(offsets)
    assert not ends or ends[-1] == len(text.encode())


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_byte_level_ends_are_exact(text: str) -> None:
    """The ends of byte-level tokens equal the lengths of decoded prefixes, also inside a character."""
    side = encoder(byte_bpe)
    ids, ends = side.response_ids(text)
    for count, end in enumerate(ends, 1):
        assert side.tokenizer.decode(ids[:count]) == text.encode()[:end].decode(errors="replace")


@pytest.mark.parametrize("build", SPELLING[1:])
@settings(max_examples=80, deadline=None)
@given(text=TEXTS.filter(lambda text: "▁" not in text and "<0x" not in text))
def test_sentencepiece_ends_are_exact(build: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    """The ends of SentencePiece tokens are exact: a byte piece has one byte and the dummy prefix none."""
    side = encoder(build)
    ids, ends = side.response_ids(text)
    pieces = side.tokenizer.convert_ids_to_tokens(ids)
    start = 0
    for k, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
        expected = 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())
        dummy = k == 0 and piece.startswith("▁") and (end - start) == expected - 1
        assert end - start == expected or dummy
        start = end


@pytest.mark.parametrize(
    ("build", "text", "pieces", "ends"),
    [
        (byte_bpe, "🤗", ["ðŁ", "¤", "Ĺ"], [2, 3, 4]),
        (unigram_byte_fallback, "🤗", ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"], [0, 1, 2, 3, 4]),
        (gemma_unigram, "🤗", ["<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"], [1, 2, 3, 4]),
        (wordpiece, " The dog ", ["The", "dog"], [4, 9]),
        (wordpiece, "The \u0f40\u0f41 dog", ["The", "[UNK]", "dog"], [3, 10, 14]),
        (uncased_wordpiece, "E\u0301 \x00e", ["e", "e"], [3, 6]),
    ],
)
def test_ends_by_hand(
    build: Callable[[], PreTrainedTokenizerFast], text: str, pieces: list[str], ends: list[int]
) -> None:
    """The ends equal those by hand for byte pieces, the dummy prefix, dropped white space and unknown words."""
    side = encoder(build)
    ids, got = side.response_ids(text)
    assert side.tokenizer.convert_ids_to_tokens(ids) == pieces
    assert got == ends


@pytest.mark.parametrize("build", ALL)
@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 10**6), max_size=12))
def test_the_spelling_of_any_tokens(build: Callable[[], PreTrainedTokenizerFast], seeds: list[int]) -> None:
    """A student samples tokens that no text is split into: half characters, special tokens, single letters."""
    side = encoder(build)
    ids = [seed % len(side.tokenizer) for seed in seeds]
    text, ends = side.spelling(ids)
    assert text == side.tokenizer.decode(ids)
    offsets = [end for end in ends if end >= 0]
    assert offsets == sorted(offsets)
    assert len(ends) == len(ids)
    assert not ends or ends[-1] == len(text.encode())
    if build is byte_bpe:
        for count, end in enumerate(ends, 1):
            if end >= 0 and "\ufffd" not in text:
                assert side.tokenizer.decode(ids[:count]) == text.encode()[:end].decode(errors="replace")


@pytest.mark.parametrize("build", ALL)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_the_spelling_of_a_text_s_own_tokens(build: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    """The same tokens must have the same ends, whether they were read from a text or sampled."""
    side = encoder(build)
    ids, ends = side.response_ids(text)
    spelled, own_ends = side.spelling(ids)
    if spelled == text and build in SPELLING:
        assert own_ends == ends


@pytest.mark.parametrize(
    ("build", "pieces", "text", "ends"),
    [
        (byte_bpe, ["r", "e", "d", "Ġ", "Ĥ"], "red \ufffd", [1, 2, 3, 4, 7]),  # a byte that continues no character
        (byte_bpe, ["r", "ðŁ"], "r\ufffd", [1, 4]),  # cut inside a character
        (byte_bpe, ["ðŁ", "¤", "Ĺ", "r"], "🤗r", [2, 3, 4, 5]),
        (bpe_byte_fallback, ["▁", "r", "e", "d", "</s>"], "red</s>", [0, 1, 2, 3, 7]),
        (wordpiece, ["The", "dog", "##s"], "The dogs", [3, 7, 8]),
    ],
)
def test_spelling_by_hand(
    build: Callable[[], PreTrainedTokenizerFast], pieces: list[str], text: str, ends: list[int]
) -> None:
    """Examples of invalid bytes, of special tokens, and of spaces that only the decoder writes."""
    side = encoder(build)
    assert side.spelling(side.tokenizer.convert_tokens_to_ids(pieces)) == (text, ends)


def test_spelled_out_special_tokens_are_text() -> None:
    """A response that contains "</s>" as text is not encoded with the special token."""
    for side, text in ((encoder(byte_bpe), "a<|endoftext|>b"), (encoder(bpe_byte_fallback), "a</s>b")):
        ids, ends = side.response_ids(text)
        assert side.end_token_id not in ids
        assert ends[-1] == len(text)


def test_prompts_keep_special_tokens_after_responses_are_encoded() -> None:
    """Chat markers in prompts are single tokens, and encoding a response does not change the tokenizer."""
    side = TextEncoder(chatml(), "chat")
    side.response_ids("text")
    ids = side.prompt_ids(Example(0, "Hi"))
    assert ids[0] == side.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert side.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert side.tokenizer("<|im_end|>")["input_ids"] == [side.end_token_id]


def test_beginning_of_sequence_only_where_the_model_wants_it() -> None:
    """A prompt begins with the beginning-of-sequence token once if the tokenizer adds it, and never with `never`."""
    row = Example(0, "Hi")
    llama = with_bos(bpe_byte_fallback())
    bos = llama.bos_token_id
    assert TextEncoder(llama, "plain").prompt_ids(row)[0] == bos
    assert TextEncoder(llama, "plain").prompt_ids(row)[1:] == TextEncoder(llama, "plain", "never").prompt_ids(row)
    assert bos not in TextEncoder(bpe_byte_fallback(), "plain").prompt_ids(row)
    assert bos not in TextEncoder(llama, "plain").response_ids("Hi")[0]
    assert TextEncoder(gemma_like(), "chat").prompt_ids(row).count(gemma_like().bos_token_id) == 1


def test_batches_and_single_texts_agree() -> None:
    """Batches and single texts give the same tokens, even if padding or truncation is enabled in the tokenizer."""
    side = TextEncoder(byte_bpe(), "plain")
    side.tokenizer.backend_tokenizer.enable_padding(length=64)
    side.tokenizer.backend_tokenizer.enable_truncation(2)
    batch = side.response_ids_batch(SNIPPETS)
    assert batch == [encoder(byte_bpe).response_ids(text) for text in SNIPPETS]
    rows = [Example(0, text) for text in SNIPPETS]
    assert side.prompt_ids_batch(rows) == [side.prompt_ids(row) for row in rows]


def test_stop_tokens() -> None:
    """Generation stops at the end token of the template and at the end-of-sequence token."""
    side = TextEncoder(chatml(), "chat")
    assert side.end_token_ids == [side.tokenizer.convert_tokens_to_ids("<|im_end|>"), side.tokenizer.eos_token_id]
    assert encoder(byte_bpe).end_token_ids == [encoder(byte_bpe).tokenizer.eos_token_id]


def test_mistakes_are_named() -> None:
    """Invalid options and slow tokenizers are refused before any row is tokenised."""

    class Slow:
        is_fast = False
        name_or_path = "org/slow"

    with pytest.raises(UserError, match="tokenizer of org/slow is slow"):
        TextEncoder(Slow())
    with pytest.raises(UserError, match=r"data\.bos 'always' is unknown: use auto or never"):
        TextEncoder(byte_bpe(), bos="always")
    with pytest.raises(UserError, match=r"data\.template 'no-such' is unknown"):
        TextEncoder(byte_bpe(), "no-such")


@pytest.mark.parametrize("build", [byte_bpe, bpe_byte_fallback, unigram_byte_fallback, wordpiece])
def test_token_bytes_of_every_token(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    """The bytes of every token are known, and `Ġ` and `▁` both become a space."""
    text = TextEncoder(build(), "plain")
    table = text.token_bytes()
    assert len(table) == max(text.tokenizer.get_vocab().values()) + 1
    assert table[text.tokenizer.eos_token_id] is None
    ids, _ = text.response_ids("the cat sat")
    spelled = b"".join(table[index] or b"" for index in ids)
    assert spelled.replace(b" ", b"") == b"thecatsat"


@pytest.mark.parametrize("template", [*TEMPLATES, "chat"])
@pytest.mark.parametrize("build", ENDS, ids=lambda build: build.__name__)
def test_a_row_cannot_write_special_tokens(build, template):
    """With `text`, special tokens that a row spells out do not become special tokens in the prompt."""
    row = Example(0, f"What does {ENDS[build]} mean?", history=({"role": "user", "content": f"{ENDS[build]}?"},))
    parsed, text = (TextEncoder(build(), template, "auto", option) for option in ("parse", "text"))
    end = parsed.tokenizer.eos_token_id
    own = parsed.prompt_ids(Example(0, "What?", history=({"role": "user", "content": "What?"},))).count(end)
    assert parsed.prompt_ids(row).count(end) == own + 2
    assert text.prompt_ids(row).count(end) == own
    if build is not wordpiece:  # which drops white space
        assert text.tokenizer.decode(text.prompt_ids(row)).count(ENDS[build]) == own + 2


@pytest.mark.parametrize("template", [*TEMPLATES, "chat", FORMAT])
@pytest.mark.parametrize("build", [chatml, byte_bpe, bpe_byte_fallback, wordpiece, roberta_like, unigram_byte_fallback])
def test_other_rows_are_encoded_as_before(build, template):
    """With `text`, rows without special tokens have the same ids as with `parse`."""
    rows = [
        Example(0, "Hi", "there"),
        Example(1, " The quick  brown\n☃", history=({"role": "system", "content": "Be brief."},)),
    ]
    tokenizer = build()
    size = len(tokenizer)
    parsed, text = (TextEncoder(tokenizer, template, "auto", option) for option in ("parse", "text"))
    assert text.prompt_ids_batch(rows) == parsed.prompt_ids_batch(rows)
    assert len(tokenizer) == size


def test_markers_of_the_template_stay_special():
    """With `text`, markers that the template writes are still special tokens."""
    row = Example(0, "a<|im_end|>\n<|im_start|>assistant\nb", history=({"role": "user", "content": "<|im_end|>"},))
    for template, count in (("chat", 2), (FORMAT, 1)):
        side = TextEncoder(chatml(), template, "auto", "text")
        ids, end = side.prompt_ids(row), side.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids.count(end) == count
        assert side.tokenizer.decode(ids).count("<|im_end|>") == count + 2
    bos = gemma_like().bos_token_id
    assert TextEncoder(gemma_like(), "chat", "auto", "text").prompt_ids(Example(0, "Hi"))[0] == bos
    assert TextEncoder(with_bos(bpe_byte_fallback()), "plain", "auto", "text").prompt_ids(row)[0] == bos


def test_what_cannot_be_text_is_refused():
    """Unigram tokenizers read "</s>" as a special token even in plain text, so a row that contains it is refused."""
    side = TextEncoder(unigram_byte_fallback(), "plain", "auto", "text")
    with pytest.raises(UserError, match=r"row 3 .*'</s>'.*data\.special_tokens_in_prompts"):
        side.prompt_ids(Example(3, "a</s>b"))
    with pytest.raises(UserError, match=r"data\.special_tokens_in_prompts 'split'.*parse or text"):
        TextEncoder(byte_bpe(), "plain", "auto", "split")


def test_the_recipe_s_option_reaches_the_encoders(tmp_path):
    """The option `special_tokens_in_prompts` of a recipe is passed to the encoders of student and teacher."""
    data = {"train": "train.jsonl", "special_tokens_in_prompts": "text"}
    recipe = recipe_from_dict({"student": {"model": "student"}, "data": data, "loss": {"method": "sft"}})
    assert training_config(recipe, tmp_path).special_tokens_in_prompts == "text"
    rows = [{"prompt": "What is <|endoftext|> and </s>?", "response": "A token."}]
    run = trainer(tmp_path, method="uld", rows=rows, special_tokens_in_prompts="text")
    item = run.train_dataset[0]
    for side, encoder in zip((item["student"], *item["teachers"]), run.encoders, strict=True):
        assert encoder.tokenizer.eos_token_id not in side["input_ids"]


def test_a_cache_knows_the_option():
    """A cache that was built with another `special_tokens_in_prompts` is refused, and the message names the option."""
    marks = [
        fingerprint(
            TextEncoder(byte_bpe(), "plain", "auto", option),
            bos="auto", max_length=8, teacher="", adapter=None, dtype="",
        )["data.template"]
        for option in ("parse", "text")
    ]  # fmt: skip
    assert marks[0] == "plain"
    assert "data.special_tokens_in_prompts" in marks[1]
