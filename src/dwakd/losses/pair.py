"""What a method may be built from: everything about the two models that training does not change."""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Int
from torch import Tensor

from dwakd.align.vocab import exact_overlap
from dwakd.losses.projectors import Widths
from dwakd.models.head import OutputHead

Tokens = tuple[bytes | None, ...]


@dataclass(frozen=True)
class ModelPair:
    """The two models as they are when training starts.

    Args:
        widths: of the two models.
        student_tokens: the bytes of text that each token of the tokenizer stands for, by id; None for special tokens. A
            head may be wider than its tokenizer.
        teacher_tokens: likewise.
        student_head: at the start; a constant here.
        teacher_head: a constant.
        end_tokens: the end-of-sequence ids (student, teacher), which stand for the same; special tokens else have no
            counterpart.
    """

    widths: Widths
    student_tokens: Tokens
    teacher_tokens: Tokens
    student_head: OutputHead
    teacher_head: OutputHead
    end_tokens: tuple[int, int] | None = None

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Rows of the student's and of the teacher's head."""
        return self.student_head.vocab_size, self.teacher_head.vocab_size

    def shared_tokens(self) -> tuple[Int[Tensor, " overlap"], Int[Tensor, " overlap"]]:
        """`exact_overlap` of the vocabularies, less the tokens that one of the heads forbids."""
        return self.possible_pairs(*exact_overlap(self.student_tokens, self.teacher_tokens, self.end_tokens))

    def possible_pairs(
        self, student_ids: Int[Tensor, " pairs"], teacher_ids: Int[Tensor, " pairs"]
    ) -> tuple[Int[Tensor, " possible"], Int[Tensor, " possible"]]:
        """The pairs of tokens of which neither head forbids its own."""
        kept = ~(self.student_head.forbidden.cpu()[student_ids] | self.teacher_head.forbidden.cpu()[teacher_ids])
        return student_ids[kept], teacher_ids[kept]

    def possible_tokens(self) -> tuple[Tokens, Tokens]:
        """The tokens of both sides, None also for those that their head forbids."""
        student, teacher = (
            tuple(None if forbidden else token for token, forbidden in zip_longest(tokens, head.forbidden.tolist()))
            for tokens, head in ((self.student_tokens, self.student_head), (self.teacher_tokens, self.teacher_head))
        )
        return student[: len(self.student_tokens)], teacher[: len(self.teacher_tokens)]

    @classmethod
    def smallest(cls) -> "ModelPair":
        """A pair with one token and width 1 on each side, to check a method's options without models."""
        head = OutputHead(torch.ones(1, 1))
        return cls(Widths(1, 1, 1, 1), (b"a",), (b"a",), head, head)
