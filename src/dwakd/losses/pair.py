"""What a method may be built from: everything about the two models that training does not change."""

from dataclasses import dataclass

import torch

from dwakd.losses.projectors import Widths
from dwakd.models.head import OutputHead


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
    student_tokens: tuple[bytes | None, ...]
    teacher_tokens: tuple[bytes | None, ...]
    student_head: OutputHead
    teacher_head: OutputHead
    end_tokens: tuple[int, int] | None = None

    @classmethod
    def smallest(cls) -> "ModelPair":
        """A pair with one token and width 1 on each side, to check a method's options without models."""
        head = OutputHead(torch.ones(1, 1))
        return cls(Widths(1, 1, 1, 1), (b"a",), (b"a",), head, head)
