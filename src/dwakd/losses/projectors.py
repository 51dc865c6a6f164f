"""The learned linear maps between two models' spaces, trained with the student and thrown away at the end."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Widths:
    """Widths of the two models; a model's embedding may be narrower or wider than its hidden states."""

    student_hidden: int
    teacher_hidden: int
    student_embedding: int
    teacher_embedding: int


class Projectors(nn.Module):
    """t2s d_t -> d_s, s2t d_s -> d_t, query 2 e_s -> 2 e_t of attention, embedding_t2s e_t -> e_s of DWA-KD; with bias.

    Raises:
        ValueError: the teacher's embeddings are not as wide as its hidden states, which V = t2s(N(h) + N(e)) of
            attention needs.
    """

    def __init__(self, widths: Widths, *, with_embedding: bool, with_query: bool = True) -> None:
        super().__init__()
        if with_query and widths.teacher_embedding != widths.teacher_hidden:
            raise ValueError(
                f"cross-model attention adds the teacher's embeddings to its hidden states, but they are "
                f"{widths.teacher_embedding} and {widths.teacher_hidden} wide; choose another teacher"
            )
        if with_query:
            self.query = nn.Linear(2 * widths.student_embedding, 2 * widths.teacher_embedding)
        self.t2s = nn.Linear(widths.teacher_hidden, widths.student_hidden)
        self.s2t = nn.Linear(widths.student_hidden, widths.teacher_hidden)
        if with_embedding:
            self.embedding_t2s = nn.Linear(widths.teacher_embedding, widths.student_embedding)
