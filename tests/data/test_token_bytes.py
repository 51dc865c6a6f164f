"""Test the bytes that tokens spell, and which ends of tokens are known, for every kind of normalisation."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dwakd.align.offsets import byte_groups, exact_rows, starts
from dwakd.align.vocab import exact_overlap
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from tests.builders import SAMPLE_TEXTS, _wrapped, bpe_byte_fallback, byte_bpe, unigram_byte_fallback, wordpiece

REPLACED = [("\u2019", "'"), ("...", "\u2026"), ("--", "\u2014"), ("ß", "ss")]
NORMALIZERS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "lowercase": normalizers.Lowercase(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "replaced": normalizers.Sequence([normalizers.Replace(old, new) for old, new in REPLACED]),
    "bert": normalizers.BertNormalizer(),
    "clip": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
    "strip": normalizers.Strip(),
}
DROPS_MARKS = ("no accents", "bert")

SNIPPETS = [
    "The ", "fox", " x", "\n", "  ", "10 \u2126", "\u212a", "\u212b", "\u2026", "...", "--", "\u2019", "\ufb01", "½", "ß",
    "e\u0301", "E\u0301 ", "a\u0308\u0323", "a\u0323\u0308", "\u0301", "\u0344", "\u1e9b\u0323", "\u0130",
    "tiê\u0301ng Vi\u1ec7t",
    "и\u0306", "가각", "\u1112\u1161\u11ab", "\u1112\u1161", "\u314e\u314f", "\u0928\u093c", "\u0958", "हिन्दी",
    "\u09c7\u09be", "\ufb2a",
    "\ufefb", "\ufdfa", "ไทยกำ", "\uff21\uff22", "\uff76\uff9e", "カ\u3099", "\u3000", "你好", "😀", "👩‍👩‍👧",
    "\u00b4", "\u200b",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=6).map("".join).filter(str.strip)


def roberta_like() -> PreTrainedTokenizerFast:
    """Return byte-level BPE that puts a space before the text and excludes white space from its offsets."""
    tokenizer = byte_bpe()
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(eos, eos, trim_offsets=True)
    return tokenizer


def suffix_bpe(suffix: str = "</w>", *, byte_level: bool = False) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer like GPT-1's or, if `byte_level`, CLIP's, which marks the end of a word with a suffix."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", end_of_word_suffix=suffix))
    words = pre_tokenizers.BertPreTokenizer()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level]) if byte_level else words
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.BPEDecoder(suffix=suffix)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<eos>"], end_of_word_suffix=suffix, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE_TEXTS, trainer)
    return _wrapped(tokenizer, unk_token="<unk>", bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


KINDS = [byte_bpe, bpe_byte_fallback, unigram_byte_fallback, wordpiece, roberta_like]


@cache
def encoder(build: Callable[[], PreTrainedTokenizerFast], normalizer: str) -> TextEncoder:
    tokenizer = build()
    steps = [step for step in (NORMALIZERS[normalizer], tokenizer.backend_tokenizer.normalizer) if step is not None]
    if NORMALIZERS[normalizer] is not None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return TextEncoder(tokenizer, "plain")


def same_text(texts: Sequence[bytes], *, marks: bool) -> bool:
    """Return whether the texts are equal, apart from Unicode form, case and white space."""
    try:
        decoded = [text.decode() for text in texts]
    except UnicodeDecodeError:
        return len({text.replace(b" ", b"").replace(b"\xe3\x80\x80", b"").strip() for text in texts}) == 1
    folded = set()
    for text in decoded:
        for old, new in REPLACED:
            text = text.replace(*((old, new) if len(old) < 2 else (new, old)))
        text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
        kinds = ("Z", "C") if marks else ("Z", "C", "M")
        folded.add("".join(c for c in text.casefold() if not unicodedata.category(c).startswith(kinds)))
    return len(folded) == 1


def assert_paired_by_text(
    sides: Sequence[TextEncoder], text: str, *, tables: Sequence[Any] | None = None, marks: bool = True
) -> None:
    """Assert that each group of tokens and each exact pair spells the same text on both sides and in the response."""
    data = text.encode()
    spelled, ends = [], []
    for side, table in zip(sides, tables or [side.token_bytes() for side in sides], strict=True):
        ids, found = side.response_ids(text)
        spelled.append([*(table[index] or b"?" for index in ids), b""])
        ends.append([*found, len(data)])
    if min(map(len, ends)) == 1:
        return  # one side has no tokens; such rows are not used
    tensors = [torch.tensor(values) for side in ends for values in (side, [len(side)])]

    groups, at = byte_groups(*tensors), [0, 0]
    for student_last in groups.student_last.nonzero().flatten().tolist():
        teacher_last = groups.teacher_last.nonzero().flatten().tolist()[int(groups.student[student_last])]
        mine, theirs = (
            b"".join(side[start : last + 1])
            for side, start, last in zip(spelled, at, (student_last, teacher_last), strict=True)
        )
        start = ends[0][at[0] - 1] if at[0] else 0
        at, stop = [student_last + 1, teacher_last + 1], ends[0][student_last]
        if b"?" not in mine + theirs:  # the bytes of unknown words are not known
            if min(start, stop) < 0:
                assert mine.strip() == theirs.strip()
            else:
                assert same_text([mine, theirs, data[start:stop]], marks=marks)
    begins = [starts(tensors[n], tensors[n + 1]).tolist() for n in (0, 2)]
    for i, j in enumerate(exact_rows(*tensors).tolist()):
        if j >= 0 and b"?" not in spelled[0][i] + spelled[1][j]:
            assert (begins[0][i], ends[0][i]) == (begins[1][j], ends[1][j])
            if min(begins[0][i], ends[0][i]) < 0:
                assert spelled[0][i] == spelled[1][j]
            else:
                claimed = data[begins[0][i] : ends[0][i]]
                assert same_text([spelled[0][i], spelled[1][j], claimed], marks=marks)


@pytest.mark.parametrize("kind", KINDS, ids=lambda build: build.__name__)
@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS,
    normalizer=st.sampled_from(sorted(NORMALIZERS)),
    other_kind=st.sampled_from(KINDS),
    other_normalizer=st.sampled_from(sorted(NORMALIZERS)),
)
@example(text="10 \u2126", normalizer="nfc", other_kind=byte_bpe, other_normalizer="none")
@example(text="one \u2026", normalizer="nfkc", other_kind=byte_bpe, other_normalizer="none")
@example(text="e\u0301 x", normalizer="nfkc", other_kind=byte_bpe, other_normalizer="none")
@example(text="a\u0308\u0323", normalizer="nfd", other_kind=unigram_byte_fallback, other_normalizer="nfc")
@example(text="The \ufdfa\ufdfa10", normalizer="nfkc", other_kind=roberta_like, other_normalizer="nfkd")
def test_normalised_text_is_paired_as_a_whole(kind, text, normalizer, other_kind, other_normalizer):
    """Aligned tokens spell the same text, whatever normalisation the two tokenizers use."""
    marks = not {normalizer, other_normalizer} & set(DROPS_MARKS)
    assert_paired_by_text([encoder(kind, normalizer), encoder(other_kind, other_normalizer)], text, marks=marks)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@settings(max_examples=15, deadline=None)
@given(text=TEXTS)
def test_one_tokenizer_pairs_every_token_with_itself(normalizer, text):
    """If both models normalise the text in the same way, all of their tokens are aligned."""
    for build in (byte_bpe, bpe_byte_fallback):
        ends = torch.tensor([*encoder(build, normalizer).response_ids(text)[1], len(text.encode())])
        lengths = torch.tensor([len(ends)])
        assert exact_rows(ends, lengths, ends, lengths).tolist() == list(range(len(ends)))
        assert byte_groups(ends, lengths, ends, lengths).student.tolist() == list(range(len(ends)))


@pytest.mark.parametrize(
    ("build", "normalizer", "text", "known"),
    [
        (byte_bpe, "nfc", "u\u0301x", [None, 3, 4]),  # the tokens are Ã and º
        (byte_bpe, "nfc", "xu\u0301x", [1, None, 4, 5]),
        (byte_bpe, "nfkc", "one \u2026!", [1, 2, 3, 4, None, None, 7, 8]),
        (unigram_byte_fallback, "nfkc", "\u2126", [0, None, 3]),  # the dummy prefix has no bytes
        (byte_bpe, "replaced", "a--b", [1, None, None, 3, 4]),
        (byte_bpe, "strip", " ab ", [2, 4]),
        (wordpiece, "bert", "E\u0301 \x00e", [3, 6]),
    ],
)
def test_only_ends_inside_changed_text_are_unknown(build, normalizer, text, known):
    """Ends are unknown only inside a part that normalisation changed."""
    ends = encoder(build, normalizer).response_ids(text)[1]
    assert [end if end >= 0 else None for end in ends] == known


@pytest.mark.parametrize("max_length", range(9, 20))
def test_a_row_is_cut_outside_changed_text(max_length):
    """A row is not truncated inside a part that normalisation changed, where ends are unknown."""
    student, teacher = encoder(byte_bpe, "nfkd"), encoder(byte_bpe, "none")
    text = "ab \u1112\u1161\u11ab\ud55c\ufdfa\u2126 x" * 3
    row = encode_pairs([Example(0, "Q", response=text)], student, teacher, max_length=max_length, max_prompt_length=8)
    assert text.startswith(row.rows[0].text)
    assert row.rows[0].student.length < max_length
    assert row.rows[0].student.byte_ends[-1] == len(row.rows[0].text.encode())


@pytest.mark.parametrize("options", [{}, {"suffix": "<e>"}, {"byte_level": True}])
def test_the_end_of_word_suffix_is_not_text(options):
    """The end-of-word suffix is not part of the bytes of a token, so that whole words match those of other vocabularies."""
    side, other = TextEncoder(suffix_bpe(**options), "plain"), TextEncoder(wordpiece(), "plain")
    mine, theirs = side.token_bytes(), other.token_bytes()
    assert not [token for token in mine if token and options.get("suffix", "</w>").encode() in token]
    shared = {mine[index] for index in exact_overlap(mine, theirs)[0].tolist()}
    assert {b"dog", b"quick", b"number"} <= shared
    ids, ends = side.response_ids("The dog is quick.")
    assert b"".join(mine[index] or b"" for index in ids) == b"Thedogisquick."
    assert {3, 7, 10, 16, 17} <= set(ends)


def test_other_marks_of_spaces_and_continuations():
    """Space markers and prefixes are read from the tokenizer, and `▁` may also be a literal character."""
    underlined = bpe_byte_fallback()
    state = underlined.backend_tokenizer.to_str().replace("▁", "_")
    backend = Tokenizer.from_str(state)
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence([]), pre_tokenizers.Metaspace("_")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("_")])
    side = TextEncoder(_wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"))
    assert side.token_bytes()[backend.token_to_id("_the")] == b" the"
    assert side.response_ids("the dog")[1][-1] == 7

    backend = Tokenizer.from_str(wordpiece().backend_tokenizer.to_str().replace('"##', '"@@'))
    side = TextEncoder(_wrapped(backend, unk_token="[UNK]", bos_token="[EOS]", eos_token="[EOS]", pad_token="[PAD]"))
    assert side.token_bytes()[backend.token_to_id("@@s")] == b"s"
    assert TextEncoder(byte_bpe(["▁ ▁"])).response_ids("▁▁")[1][-1] == 6


@pytest.mark.parametrize("texts", [SAMPLE_TEXTS, ["你好，世界。今天天气很好。"]])
@pytest.mark.parametrize(
    ("single", "leading"),
    [("<s> $A", [1]), ("<s> <s> $A </s>", [1, 1]), ("$A </s>", []), ("<s> $A </s>", [1]), ("$A", [])],
)
def test_the_beginning_is_found_for_any_vocabulary(texts, single, leading):
    """The beginning-of-sequence tokens are found for any vocabulary, also if it lacks the probed letters."""
    tokenizer = unigram_byte_fallback(texts) if texts is SAMPLE_TEXTS else wordpiece(texts)
    names = ("<s>", "</s>") if texts is SAMPLE_TEXTS else ("[UNK]", "[EOS]")
    for written, name in zip(("<s>", "</s>"), names, strict=True):
        single = single.replace(written, name)
    special = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), special])
    tokenizer.backend_tokenizer.enable_padding(length=32, direction="left")
    row = Example(0, "今天")
    bare = TextEncoder(tokenizer, "plain", "never").prompt_ids(row)
    assert TextEncoder(tokenizer, "plain").prompt_ids(row) == leading + bare
