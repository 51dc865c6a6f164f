"""Compute the DWA-KD objective literally, one example and one cell at a time, without code of dwakd."""

import itertools
import math

import torch
from torch import Tensor


def soft_dtw(cost: Tensor, gamma: float) -> Tensor:
    n, m = cost.shape
    table = {(0, 0): cost.new_zeros(())}
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            before = [table[k] for k in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if k in table]
            soft_minimum = -gamma * torch.logsumexp(torch.stack([-value / gamma for value in before]), 0)
            table[i, j] = cost[i - 1, j - 1] + soft_minimum
    return table[n, m]


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([torch.stack([1 - torch.dot(a, b) / (a.norm() * b.norm()) for b in y]) for a in x])


def kl(p_logits: Tensor, q_logits: Tensor, tau: float) -> Tensor:
    p, q = torch.softmax(p_logits / tau, -1), torch.softmax(q_logits / tau, -1)
    return (p * (p.log() - q.log())).sum()


def entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits, -1)
    return -(p * p.log()).sum()


def rescaled(weights: list[Tensor], kept: list[bool], *, rescale: bool = True) -> list[Tensor]:
    weights = [weight * keep for weight, keep in zip(weights, kept, strict=True)]
    total = sum(weights)
    return [weight * len(weights) / total for weight in weights] if rescale and total > 0 else weights


def dwa_kd(
    examples: list[dict[str, Tensor]],
    student_head: Tensor,
    teacher_head: Tensor,
    maps: dict[str, dict[str, Tensor]],
    *,
    tau: float = 2.0,
    gamma: float = 2.0,
    base: float = 5.0,
    beta: float = 2.0,
    alpha: float = 0.7,
    lam: float = 1.0,
    ce: float = 0.5,
    kd: float = 0.5,
    dtw: float = 0.2,
    weight_student: bool = True,
    weight_teacher: bool = True,
    gate: bool = True,
    use_band: bool = True,
    alignment: str = "attention",
    values: str = "hidden_and_target",
) -> dict[str, Tensor]:
    """Return terms and loss of a batch.

    `examples` contain the keys hidden, in, out and target with the prefixes student_ and teacher_, and for alignments
    that read offsets also ends.
    """

    def apply(name: str, x: Tensor) -> Tensor:
        return x @ maps[name]["weight"].T + maps[name]["bias"]

    keys = torch.cat([torch.cat([e["teacher_in"], e["teacher_out"]], 1) for e in examples])
    std_key = keys.std()
    std_hidden = torch.cat([e["teacher_hidden"] for e in examples]).std()
    std_out = torch.cat([e["teacher_out"] for e in examples]).std()
    terms = dict.fromkeys(("ce", "t2s_ce", "kd_student", "kd_teacher", "dtw_hidden", "dtw_embedding"), torch.zeros(()))
    num_tokens = sum(len(e["student_target"]) for e in examples)
    for e in examples:
        value = e["teacher_hidden"] / std_hidden
        value = apply("t2s", value + e["teacher_out"] / std_out if values == "hidden_and_target" else value)
        s_len, t_len = len(e["student_hidden"]), len(e["teacher_hidden"])
        s_kept, t_kept = [True] * s_len, [True] * t_len
        if alignment != "attention":
            s_starts, t_starts = ([0, *e[f"{name}_ends"].tolist()[:-1]] for name in ("student", "teacher"))
        if alignment == "bytes":
            s_kept, t_kept = [b in t_starts for b in s_starts], [b in s_starts for b in t_starts]
            attention, reverse = torch.zeros(s_len, t_len).double(), torch.zeros(t_len, s_len).double()
            for i, b in enumerate(s_starts):
                attention[i, max(j for j in range(t_len) if t_starts[j] <= b)] = 1
            for j, b in enumerate(t_starts):
                reverse[j, max(i for i in range(s_len) if s_starts[i] <= b)] = 1
        else:
            parts = ("in", "out") if alignment == "attention" else ("in",)
            query = apply("query", torch.cat([e[f"student_{part}"].detach() for part in parts], 1))
            key = torch.cat([e[f"teacher_{part}"] for part in parts], 1) / std_key
            scores = query @ key.T / math.sqrt(key.shape[1])
            forward, backward = scores.clone(), scores.T.clone()
            if alignment == "causal_attention":
                for i, j in itertools.product(range(s_len), range(t_len)):
                    if t_starts[j] > s_starts[i]:
                        forward[i, j] = -math.inf
                    if s_starts[i] > t_starts[j]:
                        backward[j, i] = -math.inf
            attention, reverse = forward.softmax(1), backward.softmax(1)
        t2s, s2t = attention @ value, reverse @ apply("s2t", e["student_hidden"])

        weights, divergences = [], []
        for i in range(s_len):
            own = student_head @ e["student_hidden"][i]
            projected = student_head.detach() @ t2s[i]
            target = e["student_target"][i]
            terms["ce"] = terms["ce"] - own.log_softmax(-1)[target]
            if s_kept[i]:
                terms["t2s_ce"] = terms["t2s_ce"] - projected.log_softmax(-1)[target]
            weight = entropy(own.detach()) if weight_student else torch.ones((), dtype=own.dtype)
            weights.append(weight * projected.detach().softmax(-1).max() if gate else weight)
            divergences.append(kl(projected.detach(), own, tau))
        weights = rescaled(weights, s_kept, rescale=weight_student or gate)
        for weight, value_ in zip(weights, divergences, strict=True):
            terms["kd_student"] = terms["kd_student"] + weight * value_

        weights, divergences = [], []
        for j in range(t_len):
            own = teacher_head @ e["teacher_hidden"][j]
            one = torch.ones((), dtype=own.dtype)
            weights.append(1 - entropy(own) / math.log(len(own)) if weight_teacher else one)
            divergences.append(kl(own, teacher_head @ s2t[j], tau))
        weights = rescaled(weights, t_kept, rescale=weight_teacher)
        for weight, value_ in zip(weights, divergences, strict=True):
            terms["kd_teacher"] = terms["kd_teacher"] + weight * value_

        penalty = torch.zeros_like(attention)
        if use_band:
            a = attention.detach()
            for i in range(s_len):
                mean = (torch.arange(1, t_len + 1) * a[i]).sum()
                centre = alpha * mean + (1 - alpha) * (i + 1) * t_len / s_len
                width = base + beta * torch.special.entr(a[i]).sum()
                for j in range(t_len):
                    penalty[i, j] = lam * float(abs(j + 1 - centre) > width)
        for name, x, y in (
            ("dtw_hidden", e["student_hidden"], apply("t2s", e["teacher_hidden"])),
            ("dtw_embedding", e["student_out"], apply("embedding_t2s", e["teacher_out"])),
        ):
            cross = soft_dtw(cosine_cost(x, y) + penalty, gamma)
            own_terms = soft_dtw(cosine_cost(x, x), gamma) + soft_dtw(cosine_cost(y, y), gamma)
            terms[name] = terms[name] + cross - own_terms / 2
    terms = {name: value / num_tokens for name, value in terms.items()}
    factors = {"ce": ce, "dtw_hidden": dtw, "dtw_embedding": dtw}
    terms["loss"] = torch.stack([factors.get(name, kd) * value for name, value in terms.items()]).sum()
    return terms
