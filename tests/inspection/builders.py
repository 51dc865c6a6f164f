"""Build what the tests of `dwakd inspect` look at."""

from pathlib import Path

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.inspection.tokens import Row, Summary, align_rows
from tests.builders import byte_bpe, tiny_model
from tests.command_line import make_workspace


def aligned(text: str, *tokenizers, **options) -> tuple[Row, Summary]:
    """Return a response with the tokens of student and teacher, and its counts."""
    encoders = [TextEncoder(tokenizer, "plain") for tokenizer in tokenizers]
    examples = [Example(0, "Say it.", response=text)]
    pairs = encode_pairs(examples, *encoders, length_option=None, **options)
    rows = align_rows(pairs, examples, encoders)
    return rows[0], Summary(pairs, rows)


def workspace(folder: Path) -> Path:
    """Return a folder with a student, a teacher with a smaller vocabulary, rows and a recipe."""
    make_workspace(folder)
    tokenizer = byte_bpe(vocab_size=290)
    tiny_model("qwen2", len(tokenizer)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder
