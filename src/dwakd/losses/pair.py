"""The two models' widths, vocabularies and heads, from which some methods are built before training."""

from dataclasses import dataclass
from itertools import zip_longest

from jaxtyping import Int
from torch import Tensor

from dwakd.align.projection import Spell
from dwakd.align.vocab import exact_overlap
from dwakd.batch import OutputHead

Tokens = tuple[bytes | None, ...]
Pairs = tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]


@dataclass(frozen=True)
class Widths:
    """Widths of the hidden states and of the embeddings of the two models. The two may differ within a model."""

    student_hidden: int
    teacher_hidden: int
    student_embedding: int
    teacher_embedding: int


@dataclass(frozen=True)
class ModelPair:
    """The two models at the start of training.

    Args:
        widths: widths of the two models.
        student_tokens: the bytes of each token of the student's tokenizer, by id; None for special tokens. The head may have
            more entries than the tokenizer.
        teacher_tokens: the same for the teacher's tokenizer.
        student_head: the student's head; a constant here.
        teacher_head: the teacher's head.
        end_tokens: the end-of-sequence ids (student, teacher), which match each other. Other special tokens match nothing.
        spell: functions (student, teacher) that encode tokens of the other vocabulary as `TextEncoder.spell` does. Without
            them, methods that split tokens use the longest tokens from left to right.
        spelling: digest of both tokenizers, by which results of `spell` are stored.
    """

    widths: Widths
    student_tokens: Tokens
    teacher_tokens: Tokens
    student_head: OutputHead
    teacher_head: OutputHead
    end_tokens: tuple[int, int] | None = None
    spell: tuple[Spell, Spell] | None = None
    spelling: str = ""

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Vocabulary sizes of the student's and of the teacher's head."""
        return self.student_head.vocab_size, self.teacher_head.vocab_size

    def shared_tokens(self) -> Pairs:
        """Return the pairs of tokens with equal bytes, without tokens that one of the heads forbids."""
        return self.possible_pairs(*exact_overlap(self.student_tokens, self.teacher_tokens, self.end_tokens))

    def needed_shared_tokens(self, method: str) -> Pairs:
        """Return `shared_tokens`, or raise ValueError if there are none to compare."""
        shared = self.shared_tokens()
        if not len(shared[0]):
            raise ValueError(
                f"the two vocabularies share no token, and {method} compares shared tokens; use another method"
            )
        return shared

    def possible_pairs(self, student_ids: Int[Tensor, " ids"], teacher_ids: Int[Tensor, " ids"]) -> Pairs:
        """Keep the pairs of tokens that neither head forbids."""
        kept = ~(self.student_head.forbidden.cpu()[student_ids] | self.teacher_head.forbidden.cpu()[teacher_ids])
        return student_ids[kept], teacher_ids[kept]

    def possible_tokens(self) -> tuple[Tokens, Tokens]:
        """Return the tokens of both sides, with None also for tokens that the head forbids."""
        student, teacher = (
            tuple(None if forbidden else token for token, forbidden in zip_longest(tokens, head.forbidden.tolist()))
            for tokens, head in ((self.student_tokens, self.student_head), (self.teacher_tokens, self.teacher_head))
        )
        return student[: len(self.student_tokens)], teacher[: len(self.teacher_tokens)]
