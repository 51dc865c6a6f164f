"""Compute DSKDv2 and DWA-KDv2 literally, one example and one token at a time, without code of dwakd."""

import math

import torch
from torch import Tensor

from tests.losses.reference import cosine_cost, entropy, kl, soft_dtw


def spans(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=False))


def text_pairs(student_ends: list[int], teacher_ends: list[int]) -> list[tuple[int, int]]:
    """Pair tokens of equal spans. Tokens without bytes are paired from the last one backwards at each place."""
    student, teacher = spans(student_ends), spans(teacher_ends)
    found = [(i, teacher.index(span)) for i, span in enumerate(student) if span[0] < span[1] and span in teacher]
    for place in {span for span in student if span[0] == span[1]}:
        s_rows = [i for i, span in enumerate(student) if span == place]
        t_rows = [j for j, span in enumerate(teacher) if span == place]
        found += zip(reversed(s_rows), reversed(t_rows), strict=False)
    return sorted(found)


def shared(pair) -> dict[int, int]:
    """Return the student token for each shared teacher token."""
    student = {token: index for index, token in enumerate(pair.student_tokens) if token is not None}
    found = {j: student[token] for j, token in enumerate(pair.teacher_tokens) if token in student}
    return found | {pair.end_tokens[1]: pair.end_tokens[0]}


def exact_token_kd(
    examples: list[dict[str, Tensor]],
    ends: list[tuple[list[int], list[int]]],
    student_head: Tensor,
    teacher_head: Tensor,
    pair,
    *,
    t2s: Tensor | None = None,
    embedding_t2s=None,
    tau: float = 2.0,
    weighted: bool = False,
    base: float = 5.0,
    alpha: float = 0.7,
    lam: float = 1.0,
    gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Return the terms of a batch divided by its student tokens; those of DWA-KDv2 if `weighted`."""
    tokens = shared(pair)
    t_ids, s_ids = list(tokens), list(tokens.values())
    a_s, a_t = student_head.detach()[s_ids].T, teacher_head[t_ids].T  # one column per shared token
    w_ts = a_t @ torch.linalg.pinv(a_s) if t2s is None else t2s.T
    w_st = a_s @ torch.linalg.pinv(a_t)
    names = ("ce", "t2s_ce", "kd_student", "kd_teacher")
    sums = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))

    def mean(values: list[Tensor], weights: list[Tensor]) -> Tensor | float:
        total = sum(weights)
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total if values and total > 0 else 0.0

    for e, (s_ends, t_ends) in zip(examples, ends, strict=True):
        size = len(s_ends)
        for i in range(size):
            sums["ce"] = sums["ce"] - (student_head @ e["student_hidden"][i]).log_softmax(-1)[e["student_target"][i]]
        pairs = text_pairs(s_ends, t_ends)
        cross_entropies, agreeing, agreeing_weights, in_teacher, certainties = [], [], [], [], []
        for i, j in pairs:
            teacher = teacher_head @ e["teacher_hidden"][j]
            label = tokens.get(int(teacher.argmax()))
            if label is None:
                continue
            own = student_head @ e["student_hidden"][i]
            projected = student_head.detach() @ (e["teacher_hidden"][j] @ w_ts)
            cross_entropies.append(-projected.log_softmax(-1)[label])
            one = torch.ones((), dtype=torch.float64)
            if int(projected.argmax()) == label:
                agreeing.append(kl(projected.detach(), own, tau))
                weight = entropy(own.detach()) * projected.detach().softmax(-1).max()
                agreeing_weights.append(weight if weighted else one)
            in_teacher.append(kl(teacher, teacher_head @ (e["student_hidden"][i] @ w_st), tau))
            certainties.append(1 - entropy(teacher) / math.log(len(teacher)) if weighted else one)
        sums["t2s_ce"] = sums["t2s_ce"] + size * mean(cross_entropies, [torch.ones(())] * len(cross_entropies))
        sums["kd_student"] = sums["kd_student"] + size * mean(agreeing, agreeing_weights)
        sums["kd_teacher"] = sums["kd_teacher"] + size * mean(in_teacher, certainties)
        if weighted:
            partner, t_size = dict(pairs), len(t_ends)
            penalty = torch.zeros(size, t_size, dtype=torch.float64)
            for i in range(size):
                line = (i + 1) * t_size / size
                centre = line + alpha * (partner[i] + 1 - line) if i in partner else line
                for j in range(t_size):
                    penalty[i, j] = lam * float(abs(j + 1 - centre) > base)
            for name, x, y in (
                ("dtw_hidden", e["student_hidden"], e["teacher_hidden"] @ w_ts),
                ("dtw_embedding", e["student_out"], embedding_t2s(e["teacher_out"])),
            ):
                own_terms = soft_dtw(cosine_cost(x, x), gamma) + soft_dtw(cosine_cost(y, y), gamma)
                score = soft_dtw(cosine_cost(x, y) + penalty, gamma) - own_terms / 2
                sums[name] = sums.get(name, 0.0) + score
    count = sum(len(s_ends) for s_ends, _ in ends)
    return {name: value / count for name, value in sums.items()}
