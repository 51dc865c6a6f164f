"""Maps between two models' hidden states that preserve the logits of shared tokens (DSKDv2, arXiv 2504.11426)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dwakd.batch import ModelSide, OutputHead
from dwakd.environment import widest_float
from dwakd.losses.pair import ModelPair
from dwakd.losses.sides import require_width

RTOL = 1e-12
"""Eigenvalues of a Gram matrix below RTOL x the largest count as 0, as do singular values of a head below 1e-6 x."""


class HeadMaps(nn.Module):
    """Projectors of DSKDv2: t2s is trained from a pseudo-inverse, s2t is recomputed from the student's head.

    Let S and T be the rows of the two heads for the shared tokens: those with the same bytes, and the end tokens. In the
    least-squares sense, for every state h:

        t2s: S (t2s h) = T h at initialisation        s2t: T (s2t h) = S h with the current S, as a constant

    so that a projected state gives the shared tokens the same logits as in its own model. The logits include the biases and
    scales of the heads, but not soft caps. t2s has a bias only if one of the heads has one.

    Raises:
        ValueError: the vocabularies share no token.
    """

    student_ids: Tensor
    teacher_inverse: Tensor
    teacher_bias: Tensor
    student_tokens: Tensor

    def __init__(self, pair: ModelPair) -> None:
        super().__init__()
        student, teacher = pair.student_head.detached(), pair.teacher_head.detached()
        table = student_tokens(pair)
        teacher_ids = shared_teacher_ids(pair, table)
        student_ids = table[teacher_ids]
        dtype = torch.promote_types(torch.promote_types(student.weight.dtype, teacher.weight.dtype), torch.float32)
        with torch.no_grad():
            s_rows, s_bias = _shared_rows(student, student_ids, dtype)
            t_rows, t_bias = _shared_rows(teacher, teacher_ids, dtype)
            inverse, ratio = pseudo_inverse(s_rows), teacher.scale / student.scale
            biased = student.bias is not None or teacher.bias is not None
            self.t2s = nn.Linear(teacher.hidden_size, student.hidden_size, bias=biased, dtype=dtype)
            self.t2s.weight.copy_(ratio * (inverse.T @ t_rows))
            if biased:
                self.t2s.bias.copy_(inverse.T @ (ratio * t_bias - s_bias))
            del s_rows, inverse
            self.register_buffer("student_ids", student_ids, persistent=False)
            self.register_buffer("student_tokens", table, persistent=False)
            self.register_buffer("teacher_inverse", pseudo_inverse(t_rows), persistent=False)
            self.register_buffer("teacher_bias", t_bias, persistent=False)
        self._frozen: tuple[Tensor, int, Tensor, Tensor] | None = None  # s2t of a head that is not trained (LoRA)

    def require_fit(self, student: ModelSide, teacher: ModelSide) -> None:
        """Raise ValueError unless the widths of the states fit the maps."""
        require_width(student.hidden, self.t2s.out_features, "student.hidden", "the maps between the heads")
        require_width(teacher.hidden, self.t2s.in_features, "teacher.hidden", "the maps between the heads")

    def s2t(
        self, hidden: Float[Tensor, "tokens s_hidden"], student: OutputHead, teacher: OutputHead
    ) -> Float[Tensor, "tokens t_hidden"]:
        """Project student states into the teacher's space. Gradient flows to `hidden` only."""
        version = student.weight._version
        if self._frozen is None or self._frozen[0] is not student.weight or self._frozen[1] != version:
            rows, bias = _shared_rows(student.detached(), self.student_ids, self.teacher_inverse.dtype)
            ratio = student.scale / teacher.scale
            weight = ratio * (self.teacher_inverse.T @ rows)
            offset = self.teacher_inverse.T @ (ratio * bias - self.teacher_bias)
            self._frozen = (student.weight, version, weight, offset)
        _, _, weight, offset = self._frozen
        if student.weight.requires_grad or (student.bias is not None and student.bias.requires_grad):
            self._frozen = None  # the head is trained: an optimiser may change it without a new version
        return nn.functional.linear(hidden.to(weight.dtype), weight, offset)


def student_tokens(pair: ModelPair) -> Int[Tensor, " t_vocab"]:
    """Find the student token with the same bytes for each entry of the teacher's head, or -1.

    If both vocabularies are equal, every token matches itself. If several student tokens have the same bytes, the last one is
    taken: the byte pieces of SentencePiece come first, and a tokenizer uses them only if there is no other token.
    """
    vocab, width = pair.vocabularies
    same = pair.student_tokens == pair.teacher_tokens
    if same:
        table = list(range(min(vocab, width, len(pair.student_tokens))))
    else:
        by_bytes = {token: index for index, token in enumerate(pair.student_tokens[:vocab]) if token}
        table = [by_bytes.get(token, -1) if token else -1 for token in pair.teacher_tokens[:width]]
    table += [-1] * (width - len(table))
    if pair.end_tokens is not None and not same:
        student_end, teacher_end = pair.end_tokens
        table[teacher_end] = student_end
    found = torch.tensor(table, device=pair.student_head.weight.device)
    return found.masked_fill(pair.student_head.forbidden[found.clamp_min(0)], -1)


def shared_teacher_ids(pair: ModelPair, table: Int[Tensor, " t_vocab"]) -> Int[Tensor, " shared"]:
    """Return one teacher token for each shared student token: the last one if there are several."""
    forbidden = pair.teacher_head.forbidden.tolist()
    owners = {index: owner for owner, index in enumerate(table.tolist()) if index >= 0 and not forbidden[owner]}
    if not owners:
        raise ValueError("the two vocabularies share no token to initialise the projectors from; use another method")
    return torch.tensor(sorted(owners.values()), device=table.device)


def pseudo_inverse(rows: Float[Tensor, "shared hidden"]) -> Float[Tensor, "shared hidden"]:
    """Compute the transposed Moore-Penrose inverse X of a tall matrix: X.T @ rows is the identity at full column rank.

    It uses the Gram matrix in float64, which is much cheaper than a singular value decomposition.
    """
    dtype = widest_float(rows.device)
    gram = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=dtype)
    for block in torch.split(rows, 8192):
        wide = block.to(dtype)
        gram.addmm_(wide.T, wide)
    return rows @ torch.linalg.pinv(gram, rtol=RTOL, hermitian=True).to(rows.dtype)


def _shared_rows(head: OutputHead, ids: Int[Tensor, " shared"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight and bias of some tokens. The bias is zero if the head has none."""
    own = ids.to(head.weight.device)
    rows = head.weight[own].to(ids.device, dtype)
    return rows, rows.new_zeros(len(ids)) if head.bias is None else head.bias[own].to(rows)
