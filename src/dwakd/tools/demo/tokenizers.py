"""Train two tokenizers of different families in memory, for `dwakd demo`."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STUDENT_VOCAB_SIZE = 640
TEACHER_VOCAB_SIZE = 1536

_STUDENT_SPECIALS = ["<|pad|>", "<|endoftext|>"]
_TEACHER_SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
_TEACHER_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def demo_tokenizers(texts: Sequence[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Train the student's and the teacher's tokenizer on the same texts.

    The student's tokenizer is like GPT-2's: byte-level BPE without a beginning-of-sequence token. Its vocabulary is so
    small that many words consist of several tokens. The teacher's tokenizer is like Llama 2's: SentencePiece-style BPE
    with a visible space before words, byte fallback for unknown characters, and `<s>` before the text. Unigram, the
    other model of SentencePiece, is not used, because its trainer in `tokenizers` is not deterministic.

    Args:
        texts: the training texts, for example all prompts and responses of a corpus.

    Returns:
        The student's and the teacher's tokenizer. The same texts give the same tokenizers, and decoding restores the
        text. A vocabulary is smaller than its constant if the texts have no more pairs to merge.
    """
    return _train_student(texts), _train_teacher(texts)


def _train_student(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=STUDENT_VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=_STUDENT_SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, end = _STUDENT_SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, clean_up_tokenization_spaces=False
    )


def _train_teacher(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    unknown, begin, end, pad = _TEACHER_SPECIALS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", behavior="merged_with_next"), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER_VOCAB_SIZE - len(_TEACHER_BYTES), special_tokens=_TEACHER_SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model = _with_byte_fallback(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def _with_byte_fallback(tokenizer: Tokenizer) -> models.BPE:
    """Add a token for each byte after the special tokens of a trained model, as in Llama 2."""
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    num_specials = len(_TEACHER_SPECIALS)
    pieces[num_specials:num_specials] = _TEACHER_BYTES
    return models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=_TEACHER_SPECIALS[0],
        byte_fallback=True,
        fuse_unk=True,
    )
