"""Implement the papers' training steps in plain torch for comparison, with full logits under autograd and no kernels.

`published_*` compute logits of all positions, including prompt and padding, and mask them at the end. The DWA-KD
version aligns one example at a time. They repeat what DSKD's published code does with every logit in every step: it
replaces NaN and infinity, divides by a second temperature of 1, and computes accuracies for the log. They omit the mean
peak probability, which is also for the log, and sums over processes. `response_*` select the response tokens first and
do none of this.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from dwakd.batch import PairedBatch, TokenBatch
from dwakd.kernels import soft_dtw
from dwakd.losses.attention import Projectors

TEMPERATURE, TEACHER_TEMPERATURE = 2.0, 1.0


def sft_all_positions(student: PreTrainedModel, batch: PairedBatch) -> Tensor:
    """Compute the cross-entropy from the logits of all positions; other positions than the response are masked."""
    logits = student(batch.student.input_ids, attention_mask=batch.student.attention_mask).logits
    mask = batch.student.response_mask
    targets = batch.student.target_ids.masked_fill(~mask, -100)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / mask.sum()


def sft_response(student: PreTrainedModel, batch: PairedBatch) -> Tensor:
    """Compute the cross-entropy from the logits of the response tokens."""
    mask = batch.student.response_mask
    hidden = student.base_model(batch.student.input_ids, attention_mask=batch.student.attention_mask).last_hidden_state[
        mask
    ]
    return cross_entropy(student.get_output_embeddings()(hidden), batch.student.target_ids[mask])


def published_dskd(
    student: PreTrainedModel, teacher: PreTrainedModel, projectors: Projectors, batch: PairedBatch
) -> Tensor:
    """Compute DSKD with cross-model attention over all positions, as in the published code."""
    return _published(student, teacher, projectors, batch, weighted=False)


def published_dwa_kd(
    student: PreTrainedModel, teacher: PreTrainedModel, projectors: Projectors, batch: PairedBatch
) -> Tensor:
    """Compute DWA-KD over all positions, with its weights and six Soft-DTW calls for each example."""
    return _published(student, teacher, projectors, batch, weighted=True)


def _forward(model: PreTrainedModel, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, final hidden states, and the embeddings of the input tokens and of the target tokens."""
    output = model(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    table = model.get_input_embeddings().weight
    targets = tokens.target_ids.masked_fill(~tokens.response_mask, 0)
    return output.logits, output.hidden_states[-1], table[tokens.input_ids], table[targets]


def _published(
    student: PreTrainedModel, teacher: PreTrainedModel, projectors: Projectors, batch: PairedBatch, *, weighted: bool
) -> Tensor:
    s_mask, t_mask = (tokens.response_mask for tokens in batch)
    targets = batch.student.target_ids
    logits, hidden, read, predicted = _forward(student, batch.student)
    with torch.no_grad():
        t_logits, t_hidden, t_read, t_predicted = _forward(teacher, batch.teachers[0])

    query = projectors.query(torch.cat([read, predicted], -1).detach())
    key = torch.cat([t_read, t_predicted], -1)
    key = key / key.std()
    value = projectors.t2s(t_hidden / t_hidden.std() + t_predicted / t_predicted.std())
    scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
    scores = scores.masked_fill(~(s_mask[:, :, None] & t_mask[:, None, :]), -1e5)
    attention = scores.softmax(-1)
    t2s_logits = attention @ value @ student.get_output_embeddings().weight.detach().T
    s2t_hidden = scores.transpose(1, 2).softmax(-1) @ projectors.s2t(hidden)
    s2t_logits = s2t_hidden @ teacher.get_output_embeddings().weight.T

    ce = _cross_entropy(logits, targets)
    t2s_ce = _cross_entropy(t2s_logits, targets)
    right = t2s_logits.argmax(-1) == targets
    kd_student = _published_kl(t2s_logits.detach(), logits, TEACHER_TEMPERATURE)
    kd_teacher = _published_kl(t_logits, s2t_logits)
    if weighted:
        gate = t2s_logits.detach().softmax(-1).amax(-1)
        kd_student = kd_student * _rescaled(_entropy(logits.detach()) * gate, s_mask)
        kd_teacher = kd_teacher * _rescaled(1 - _entropy(t_logits) / math.log(t_logits.shape[-1]), t_mask)
    else:
        kd_student = kd_student * right
    loss = 0.5 * (ce * s_mask).sum()
    loss = loss + 0.5 * ((t2s_ce * s_mask).sum() + (kd_student * s_mask).sum() + (kd_teacher * t_mask).sum())
    if weighted:
        pairs = ((hidden, projectors.t2s(t_hidden)), (predicted, projectors.embedding_t2s(t_predicted)))
        loss = loss + 0.2 * _alignment(pairs, attention.detach(), s_mask, t_mask)
    logged = (
        (right * s_mask).sum(),
        ((logits.argmax(-1) == targets) * s_mask).sum(),
        ((s2t_logits.argmax(-1) == batch.teachers[0].target_ids) * t_mask).sum(),
    )
    [value.item() for value in logged]
    return loss / s_mask.sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy; replaces NaN and infinite logits in place."""
    logits.masked_fill_(logits.isnan() | logits.isinf(), 0.0)
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _published_kl(p_logits: Tensor, q_logits: Tensor, p_temperature: float | None = None) -> Tensor:
    """Compute the KL divergence with more passes than `_kl`: p and log p apart, two temperatures, infinities masked."""
    q_logits, p_logits = q_logits / TEMPERATURE, p_logits / TEMPERATURE
    if p_temperature is not None:
        p_logits = p_logits / p_temperature
    p, log_p, log_q = p_logits.softmax(-1), p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p * (log_p - log_q)).masked_fill_(q_logits.isinf(), 0.0).sum(-1)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = ((side.float() / TEMPERATURE).log_softmax(-1) for side in (p_logits, q_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _rescaled(weights: Tensor, mask: Tensor) -> Tensor:
    weights = weights * mask
    return weights * mask.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)


def _alignment(pairs: tuple[tuple[Tensor, Tensor], ...], attention: Tensor, s_mask: Tensor, t_mask: Tensor) -> Tensor:
    total = attention.new_zeros(())
    for example in range(len(s_mask)):
        s_rows, t_rows = s_mask[example], t_mask[example]
        own = attention[example][s_rows][:, t_rows]
        rows, columns = (torch.arange(1, n + 1, dtype=own.dtype) for n in own.shape)
        centre = 0.7 * (own @ columns) + 0.3 * rows * (own.shape[1] / own.shape[0])
        width = 5.0 + 2.0 * torch.special.entr(own).sum(-1)
        band = ((columns - centre[:, None]).abs() > width[:, None]).to(own.dtype)
        for x, y in pairs:
            x_unit, y_unit = normalize(x[example][s_rows], dim=-1), normalize(y[example][t_rows], dim=-1)
            costs = (1 - x_unit @ y_unit.T + band, 1 - x_unit @ x_unit.T, 1 - y_unit @ y_unit.T)
            cross, left, right = (soft_dtw(cost[None], 2.0)[0] for cost in costs)
            total = total + cross - (left + right) / 2
    return total


def response_dskd(
    student: PreTrainedModel, teacher: PreTrainedModel, projectors: Projectors, batch: PairedBatch
) -> Tensor:
    """Compute DSKD for the response tokens only, which shows how much this selection saves."""
    s_mask, t_mask = batch.student.response_mask, batch.teachers[0].response_mask
    hidden = student.base_model(batch.student.input_ids, attention_mask=batch.student.attention_mask).last_hidden_state
    table, t_table = (model.get_input_embeddings().weight.detach() for model in (student, teacher))
    read, predicted = table[batch.student.input_ids], table[batch.student.target_ids]
    t_read, t_predicted = t_table[batch.teachers[0].input_ids], t_table[batch.teachers[0].target_ids]
    with torch.no_grad():
        t_hidden = teacher.base_model(
            batch.teachers[0].input_ids, attention_mask=batch.teachers[0].attention_mask
        ).last_hidden_state
    query = projectors.query(torch.cat([read, predicted], -1))
    key = torch.cat([t_read, t_predicted], -1)
    key = key / key[t_mask].std()
    value = projectors.t2s(t_hidden / t_hidden[t_mask].std() + t_predicted / t_predicted[t_mask].std())
    scores = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
    scores = scores.masked_fill(~(s_mask[:, :, None] & t_mask[:, None, :]), -1e5)
    targets = batch.student.target_ids[s_mask]
    head, t_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    logits = hidden[s_mask] @ head.T
    t2s_logits = (scores.softmax(-1) @ value)[s_mask] @ head.detach().T
    s2t_hidden = scores.transpose(1, 2).softmax(-1) @ projectors.s2t(hidden)
    kd_student = _kl(t2s_logits.detach(), logits) * (t2s_logits.argmax(-1) == targets)
    kd_teacher = _kl(t_hidden[t_mask] @ t_head.T, s2t_hidden[t_mask] @ t_head.T)
    ce, t2s_ce = (cross_entropy(side, targets, reduction="sum") for side in (logits, t2s_logits))
    return 0.5 * (ce + t2s_ce + kd_student.sum() + kd_teacher.sum()) / len(targets)
