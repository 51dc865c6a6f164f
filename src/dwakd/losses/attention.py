"""Cross-model attention (DSKD, arXiv 2406.17328; DWA-KD, equations 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dwakd.align.offsets import text_read
from dwakd.batch import ModelSide
from dwakd.losses.pair import Widths
from dwakd.losses.record import record
from dwakd.losses.scale import TeacherScale
from dwakd.losses.sides import is_long, pad_rows, require_width, unpad_rows, valid

_CELLS = 1 << 20  # attention weights in a block of a long response


class Projectors(nn.Module):
    """Linear maps with bias of DSKD and DWA-KD, for hidden widths d and embedding widths e of the two models.

        t2s: d_t -> d_s        query: 2 e_s -> 2 e_t, for attention
        s2t: d_s -> d_t        embedding_t2s: e_t -> e_s, for DWA-KD

    Args:
        widths: the widths.
        with_embedding: whether to create `embedding_t2s`.
        query_parts: number of embeddings that `query` reads and returns: 2 for those of the token read and of the target, 1
            for that of the token read alone, 0 without `query`.
        adds_targets: whether the values are V = t2s(N(h) + N(e)), for embeddings e of the targets.

    Raises:
        ValueError: the values add the teacher's embeddings and hidden states, but their widths differ.
    """

    def __init__(
        self, widths: Widths, *, with_embedding: bool, query_parts: int = 2, adds_targets: bool = True
    ) -> None:
        super().__init__()
        if adds_targets and widths.teacher_embedding != widths.teacher_hidden:
            raise ValueError(
                "cross-model attention adds the teacher's embeddings to its hidden states, but their widths are "
                f"{widths.teacher_embedding} and {widths.teacher_hidden}; set loss.values=hidden or choose another teacher"
            )
        if query_parts:
            self.query = nn.Linear(query_parts * widths.student_embedding, query_parts * widths.teacher_embedding)
        self.t2s = nn.Linear(widths.teacher_hidden, widths.student_hidden)
        self.s2t = nn.Linear(widths.student_hidden, widths.teacher_hidden)
        if with_embedding:
            self.embedding_t2s = nn.Linear(widths.teacher_embedding, widths.student_embedding)
        self.widths, self.with_embeddings = widths, with_embedding or adds_targets or query_parts > 0

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


class Focus(NamedTuple):
    """Where each student token attends, padded; constants.

    Args:
        centre: mean column of the attended teacher tokens, from 0.
        entropy: entropy of the attention in nats.
    """

    centre: Float[Tensor, "batch s_length"]
    entropy: Float[Tensor, "batch s_length"]

    @classmethod
    def of(cls, weights: Float[Tensor, "*batch s_length t_length"]) -> Focus:
        """Compute the focus of attention weights."""
        weights = weights.detach()
        columns = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        return cls(weights @ columns, torch.special.entr(weights).sum(-1))


class CrossModelAttention(NamedTuple):
    """The states of each model in the other's space, one for each token of the other model.

    Args:
        t2s_hidden: h^{t->s}, a projected teacher state for each student token. Gradient: query, t2s.
        s2t_hidden: h^{s->t}, a projected student state for each teacher token. Gradient: query, s2t, student hidden states.
        focus: mean and entropy of the attention weights A of equation 1; None if tokens are paired by position. A constant.
        student_kept: whether each student token takes part in the distillation terms of the student's space; None for all.
        teacher_kept: the same for each teacher token and the term of the teacher's space.
    """

    t2s_hidden: Float[Tensor, "s_tokens s_hidden"]
    s2t_hidden: Float[Tensor, "t_tokens t_hidden"]
    focus: Focus | None = None
    student_kept: Bool[Tensor, " s_tokens"] | None = None
    teacher_kept: Bool[Tensor, " t_tokens"] | None = None


def teacher_values(
    teacher: ModelSide, scale: TeacherScale, dtype: torch.dtype, *, with_targets: bool
) -> Float[Tensor, "t_tokens t_hidden"]:
    """Compute what t2s projects of the teacher: N(h_j), and with targets N(h_j) + N(e_{j+1}); a constant."""
    _, hidden_std, target_std = scale.std.to(dtype)
    values = teacher.hidden.detach().to(dtype) / hidden_std
    return values + teacher.target_embeddings.detach().to(dtype) / target_std if with_targets else values


def cross_model_attention(
    student: ModelSide,
    teacher: ModelSide,
    projectors: Projectors,
    scale: TeacherScale,
    *,
    causal: bool = False,
    with_targets: bool = True,
) -> CrossModelAttention:
    """Project each model's states into the other's space and align them by attention (equations 1 and 2).

        h^{t->s} = softmax(Q K' / sqrt(2 d_t)) V,    softmax over teacher tokens
        h^{s->t} = softmax(K Q' / sqrt(2 d_t)) s2t(h^s),    softmax over student tokens

    with Q = query([e_i ; e_{i+1}]) of the student's detached embeddings, and K = N([e_j ; e_{j+1}]) and
    V = t2s(N(h_j) + N(e_{j+1})) of the teacher, which is a constant. Without `with_targets`, V = t2s(N(h_j)).

    Learned attention lets a token read what comes after it. With `causal`, Q = query(e_i) and K = N(e_j), and a token attends
    only to tokens of the other model at which no more text has been read.

    The attention weights of responses above `LONG` tokens are computed in blocks (`_Attention`).
    """
    projectors.require_fit(student, teacher)
    dtype = projectors.query.weight.dtype
    own, theirs = (
        side.input_embeddings if causal else torch.cat([side.input_embeddings, side.target_embeddings], -1)
        for side in (student, teacher)
    )
    query = projectors.query(own.detach().to(dtype))
    value = projectors.t2s(teacher_values(teacher, scale, dtype, with_targets=with_targets))
    back = projectors.s2t(student.hidden.to(dtype))
    # maps in bfloat16 or autocast give products in bfloat16, in which positions above 256 are rounded
    query, value, back = (part.to(torch.promote_types(dtype, torch.float32)) for part in (query, value, back))
    key = theirs.detach().to(query.dtype) / scale.std[0].to(query.dtype)

    if is_long(student, teacher):
        return _attend_in_blocks(student, teacher, (query, value), (key, back), causal=causal)
    s_length, t_length = max(student.counts), max(teacher.counts)
    queries = pad_rows(query, student.lengths, s_length)
    keys = pad_rows(key, teacher.lengths, t_length)
    scores = queries @ keys.transpose(1, 2) / math.sqrt(key.shape[-1])
    s_valid, t_valid = valid(student.lengths, s_length), valid(teacher.lengths, t_length)
    t_hidden, s_hidden = ~t_valid[:, None, :], ~s_valid[:, :, None]
    if causal:
        read, others = _bounds(student, s_length), _bounds(teacher, t_length)
        t_hidden, s_hidden = t_hidden | (others[1] > read[0].mT), s_hidden | (read[1].mT > others[0])
    weights = scores.masked_fill(t_hidden, -torch.inf).softmax(-1)
    record(attention=weights)
    reverse = scores.masked_fill(s_hidden, -torch.inf).softmax(1).transpose(1, 2)
    t2s_hidden = weights @ pad_rows(value, teacher.lengths, t_length)
    s2t_hidden = reverse @ pad_rows(back, student.lengths, s_length)
    return CrossModelAttention(
        unpad_rows(t2s_hidden, student.lengths, student.hidden.shape[0]),
        unpad_rows(s2t_hidden, teacher.lengths, teacher.hidden.shape[0]),
        Focus.of(weights),
    )


def _attend_in_blocks(
    student: ModelSide,
    teacher: ModelSide,
    own: tuple[Float[Tensor, "s_tokens width"], Float[Tensor, "t_tokens s_hidden"]],
    theirs: tuple[Float[Tensor, "t_tokens width"], Float[Tensor, "s_tokens t_hidden"]],
    *,
    causal: bool,
) -> CrossModelAttention:
    """Compute the attention of each model to the other one example at a time, from queries and values of both."""
    bounds = [
        text_read(side.byte_ends, side.lengths) if causal else (torch.zeros_like(side.byte_ends),) * 2
        for side in (student, teacher)
    ]
    counts = student.counts, teacher.counts
    (query, key), (value, back) = (own[0], theirs[0]), (own[1], theirs[1])
    s_parts = [torch.split(part, list(counts[0])) for part in (query, back, *bounds[0])]
    t_parts = [torch.split(part, list(counts[1])) for part in (key, value, *bounds[1])]
    attend: Any = _Attention.apply  # untyped
    t2s, s2t = [], []
    for (q, b, s_first, s_last), (k, v, t_first, t_last) in zip(
        zip(*s_parts, strict=True), zip(*t_parts, strict=True), strict=True
    ):
        t2s.append(attend(q, k, v, s_first, t_last))
        s2t.append(attend(k, q, b, t_first, s_last)[0])
    t2s_hidden, centre, entropy = (torch.cat(parts) for parts in zip(*t2s, strict=True))
    padded = [pad_rows(part[:, None], student.lengths, max(student.counts))[..., 0] for part in (centre, entropy)]
    return CrossModelAttention(t2s_hidden, torch.cat(s2t), Focus(*padded))


class _Attention(torch.autograd.Function):
    """Return attended values, and centre and entropy of the attention; a row sees columns with last <= its first.

    Blocks of weights are computed in the same memory, and again in the backward pass, because allocators of CPUs do not reuse
    the memory of many large tensors well.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, (centre, entropy) = value.new_empty(len(query), value.shape[1]), value.new_empty(2, len(query))
        columns = torch.arange(len(key), device=key.device, dtype=key.dtype)
        for part, weights, spare in _blocks(query, key, first, last):
            torch.mm(weights, value, out=attended[part])
            torch.mv(weights, columns, out=centre[part])
            torch.sum(torch.special.entr(weights, out=spare), -1, out=entropy[part])
        ctx.save_for_backward(query, key, value, first, last, attended)
        ctx.mark_non_differentiable(centre, entropy)
        return attended, centre, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        query, key, value, first, last, attended = ctx.saved_tensors
        query_grad, key_grad, value_grad = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part, weights, spare in _blocks(query, key, first, last):
            value_grad.addmm_(weights.T, grad[part])
            change = torch.mm(grad[part], value.T, out=spare)
            change.sub_((grad[part] * attended[part]).sum(-1, keepdim=True)).mul_(weights).div_(
                math.sqrt(key.shape[-1])
            )
            torch.mm(change, key, out=query_grad[part])
            key_grad.addmm_(change.T, query[part])
        return query_grad, key_grad, value_grad, None, None


def _blocks(query: Tensor, key: Tensor, first: Tensor, last: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Compute the weights of rows of queries; yield the rows, their weights and memory of the same shape, both reused."""
    rows = min(len(query), max(1, _CELLS // len(key)))
    buffers = query.new_empty(2, rows, len(key))
    for start in range(0, len(query), rows):
        part = slice(start, min(start + rows, len(query)))
        weights, spare = buffers[:, : part.stop - start]
        torch.mm(query[part], key.T, out=weights).div_(math.sqrt(key.shape[-1]))
        weights.masked_fill_(last > first[part, None], -torch.inf)
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        yield part, weights.div_(weights.sum(-1, keepdim=True)), spare


def _bounds(side: ModelSide, length: int) -> list[Int[Tensor, "batch 1 length"]]:
    """Return `text_read`, padded with 0."""
    bounds = text_read(side.byte_ends, side.lengths)
    return [pad_rows(bound[:, None], side.lengths, length).mT for bound in bounds]
