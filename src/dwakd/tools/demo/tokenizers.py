"""Train two tokenizers of different families in memory, for `dwakd demo`."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STUDENT_VOCAB_SIZE, TEACHER_VOCAB_SIZE = 640, 1536


def demo_tokenizers(texts: Sequence[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Train the student's and the teacher's tokenizer on the same texts; the result depends on the texts only.

    The student's tokenizer is like GPT-2's: byte-level BPE without a beginning-of-sequence token. Its vocabulary is so
    small that many words consist of several tokens. The teacher's tokenizer is like Llama 2's: SentencePiece-style BPE
    with a visible space before words, byte fallback for unknown characters, and `<s>` before the text. Unigram, the
    other model of SentencePiece, is not used, because its trainer in `tokenizers` is not deterministic. A vocabulary
    is smaller than its constant if the texts have no more pairs to merge.
    """
    names = {"pad_token": "<|pad|>", "eos_token": "<|endoftext|>"}
    student = Tokenizer(models.BPE())
    student.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    student.decoder = decoders.ByteLevel()
    _train(student, texts, STUDENT_VOCAB_SIZE, list(names.values()), sorted(pre_tokenizers.ByteLevel.alphabet()))
    return _wrapped(student, **names), _train_teacher(texts)


def _train_teacher(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Punctuation()])
    _train(tokenizer, texts, TEACHER_VOCAB_SIZE - len(byte_tokens), list(names.values()), [])
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    pieces[len(names) : len(names)] = byte_tokens  # after the special tokens, as in Llama 2
    tokenizer.model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    spaces = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[begin])
    return _wrapped(tokenizer, **names)


def _train(tokenizer: Tokenizer, texts: Sequence[str], size: int, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)


def _wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
