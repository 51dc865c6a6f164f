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
        student_end_id: the token that ends a response, if known.
        teacher_end_id: likewise.
    """

    widths: Widths
    student_tokens: tuple[bytes | None, ...]
    teacher_tokens: tuple[bytes | None, ...]
    student_head: OutputHead
    teacher_head: OutputHead
    student_end_id: int | None = None
    teacher_end_id: int | None = None

    @classmethod
    def smallest(cls) -> "ModelPair":
        """A pair with one token and width 1 on each side, to check a method's options without models."""
        head = OutputHead(torch.ones(1, 1))
        return cls(Widths(1, 1, 1, 1), (b"a",), (b"a",), head, head)
