"""Linear maps between two models' spaces. They are trained with the student and not needed after training."""

from dataclasses import dataclass

from torch import nn

from dwakd.batch import ModelSide
from dwakd.losses.sides import require_width


@dataclass(frozen=True)
class Widths:
    """Widths of the hidden states and of the embeddings of the two models. The two may differ within a model."""

    student_hidden: int
    teacher_hidden: int
    student_embedding: int
    teacher_embedding: int


class Projectors(nn.Module):
    """Linear maps with bias of DSKD and DWA-KD, for hidden widths d and embedding widths e of the two models.

        t2s: d_t -> d_s        query: 2 e_s -> 2 e_t, for attention
        s2t: d_s -> d_t        embedding_t2s: e_t -> e_s, for DWA-KD

    Args:
        widths: widths of the two models.
        with_embedding: whether to create `embedding_t2s`.
        with_query: whether to create `query`.

    Raises:
        ValueError: `query` is created but the teacher's embeddings and hidden states have different widths, although
            attention adds them: V = t2s(N(h) + N(e)).
    """

    def __init__(self, widths: Widths, *, with_embedding: bool, with_query: bool = True) -> None:
        super().__init__()
        if with_query and widths.teacher_embedding != widths.teacher_hidden:
            raise ValueError(
                "cross-model attention adds the teacher's embeddings to its hidden states, but their widths are "
                f"{widths.teacher_embedding} and {widths.teacher_hidden}; choose another teacher"
            )
        if with_query:
            self.query = nn.Linear(2 * widths.student_embedding, 2 * widths.teacher_embedding)
        self.t2s = nn.Linear(widths.teacher_hidden, widths.student_hidden)
        self.s2t = nn.Linear(widths.student_hidden, widths.teacher_hidden)
        if with_embedding:
            self.embedding_t2s = nn.Linear(widths.teacher_embedding, widths.student_embedding)
        self.widths, self.with_embeddings = widths, with_embedding or with_query

    def require_fit(self, student: ModelSide, teacher: ModelSide) -> None:
        """Raise ValueError unless the widths of both sides fit the maps."""
        sides = (
            ("student", student, self.widths.student_hidden, self.widths.student_embedding),
            ("teacher", teacher, self.widths.teacher_hidden, self.widths.teacher_embedding),
        )
        for name, side, hidden, embedding in sides:
            require_width(side.hidden, hidden, f"{name}.hidden", "the projectors")
            if self.with_embeddings:
                for field in ("input_embeddings", "target_embeddings"):
                    require_width(getattr(side, field), embedding, f"{name}.{field}", "the projectors")
