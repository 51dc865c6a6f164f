"""The learned linear maps between two models' spaces, trained with the student and thrown away at the end."""

from dataclasses import dataclass

from torch import nn

from dwakd.batch import ModelSide
from dwakd.losses.sides import require_width


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
        self.widths, self.with_embeddings = widths, with_embedding or with_query

    def require_fit(self, student: ModelSide, teacher: ModelSide) -> None:
        """Raise ValueError unless the sides are as wide as the maps."""
        sides = (
            ("student", student, self.widths.student_hidden, self.widths.student_embedding),
            ("teacher", teacher, self.widths.teacher_hidden, self.widths.teacher_embedding),
        )
        for name, side, hidden, embedding in sides:
            require_width(side.hidden, hidden, f"{name}.hidden", "the projectors")
            if self.with_embeddings:
                for field in ("input_embeddings", "target_embeddings"):
                    require_width(getattr(side, field), embedding, f"{name}.{field}", "the projectors")
