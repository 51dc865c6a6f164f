"""Run a trained student, its teacher and its loss on rows, and collect what the loss computed for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.data.collator import collate
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import align_by_spelling
from dwakd.errors import explained
from dwakd.evaluation.run import load_for_evaluation
from dwakd.kernels.head_loss import CrossEntropy, head_loss
from dwakd.kernels.soft_dtw import soft_dtw
from dwakd.losses.base import DistillationLoss, constant_rows
from dwakd.losses.record import Recorded, recording
from dwakd.losses.scale import TeacherScale
from dwakd.losses.weighted_sum import WeightedSumLoss
from dwakd.models.loading import load_causal_lm
from dwakd.models.rows import response_side
from dwakd.recipe.recipe import Recipe
from dwakd.training.distiller import LOSS_STATE, build_method
from dwakd.training.run import training_config
from dwakd.training.teacher import OnlineTeacher

VALUES = {
    "student_entropy": (0, "student's entropy in nats"),
    "gate": (0, "gate: largest probability of the projected teacher"),
    "student_weight": (0, "weight in kd_student"),
    "paired_teacher_weight": (0, "weight in kd_teacher"),
    "teacher_entropy": (1, "teacher's entropy in nats"),
    "teacher_weight": (1, "weight in kd_teacher"),
}
"""Values of single tokens that losses record, with the side whose tokens have them (0 is the student) and a title."""
PATHS = {"dtw_hidden": "expected path of the hidden states", "dtw_embedding": "expected path of the embeddings"}


class Computed(NamedTuple):
    """What one method computed for one row."""

    method: str
    maps: dict[str, Tensor]  # matrices (student tokens, teacher tokens) of attention and of expected paths, by title
    outside_band: Tensor | None  # True at the pairs outside the band
    values: list[tuple[int, str, list[float]]]  # values of single tokens: side, title, one number for each token


@torch.no_grad()
def compute(
    run: Any, recipe: Recipe, pairs: EncodedPairs, encoders: Sequence[TextEncoder]
) -> tuple[list[list[Computed]], list[float]]:
    """Run the models of a trained run on rows, with the first of several teachers, and its loss with the trained maps.

    N(x) = x / std(x) uses the statistics of these rows, as training uses those of its batch.

    Returns:
        For each row what each method of the loss computed, and the mean probability of student and teacher of the end token
        where responses end (an empty list if all responses are cut).
    """
    section, trusted = recipe.teachers[0], recipe.student.trust_remote_code
    load = load_causal_lm if recipe.training.get("use_cpu") else load_for_evaluation
    student = load(str(run), trust_remote_code=trusted)
    teacher = OnlineTeacher(
        load_causal_lm(section.model, **section.model_copy(update={"tp_plan": None}).loading()),
        with_attention=recipe.loss.needs_attention,
    )
    loss = build_method(training_config(recipe, run), student, [teacher], encoders[:2]).to(student.device)
    assert isinstance(loss, DistillationLoss)
    path, own = run / LOSS_STATE, "losses.0." if len(recipe.teachers) > 1 else ""
    state = load_file(path) if path.is_file() else {}
    with explained(f"{path} does not hold the maps of the run's recipe; restore {run}"):
        loss.load_state_dict({name.removeprefix(own): value for name, value in state.items() if name.startswith(own)})
    if loss.options.needs_edit_alignment:
        align_by_spelling(pairs, *encoders)
    batch = collate([pairs.of_teacher(0)[index] for index in range(len(pairs))]).to(student.device)
    sides = response_side(student, batch.student, attention=loss.needs_attention), teacher.side(batch.teachers[0])
    return by_method(loss, *sides), _end_probabilities(pairs, *sides)


def by_method(
    loss: Any, student: ModelSide, teacher: ModelSide, scale: TeacherScale | None = None
) -> list[list[Computed]]:
    """Return for each row of a batch what each method of a loss computed."""
    found = []
    parts: Any = loss.parts.values() if isinstance(loss, WeightedSumLoss) else [loss]
    for part in parts:
        with recording() as recorded:
            part(student, teacher, teacher_scale=scale)
        found.append(_by_row(part.options.method_name(), recorded, student, teacher))
    return [list(row) for row in zip(*found, strict=True)]


def _by_row(method: str, recorded: Recorded, student: ModelSide, teacher: ModelSide) -> list[Computed]:
    """Divide what a loss recorded for a batch among its rows."""
    maps = {"cross-model attention": recorded["attention"][0]} if "attention" in recorded else {}
    if "cross_costs" in recorded:
        (costs,), (gamma,), (names,) = (recorded[key] for key in ("cross_costs", "gamma", "sequence_terms"))
        for name, cost in zip(names, costs, strict=True):
            maps[PATHS[name]] = expected_path(cost, gamma, student.lengths, teacher.lengths)
    outside = recorded.get("outside_band", [None])[0]
    sides = student, teacher
    values = [
        (side, title, torch.split(torch.cat(recorded[name]), list(sides[side].counts)))
        for name, (side, title) in VALUES.items()
        if name in recorded
    ]
    return [
        Computed(
            method,
            {title: table[row, :s_count, :t_count].cpu() for title, table in maps.items()},
            None if outside is None else outside[row, :s_count, :t_count].cpu(),
            [(side, title, numbers[row].tolist()) for side, title, numbers in values],
        )
        for row, (s_count, t_count) in enumerate(zip(student.counts, teacher.counts, strict=True))
    ]


def expected_path(cost: Tensor, gamma: float, student_lengths: Tensor, teacher_lengths: Tensor) -> Tensor:
    """Compute the probability that the alignment of Soft-DTW passes through each pair of tokens.

    This is the gradient of Soft-DTW with respect to its costs. A path is drawn in proportion to exp(-cost / gamma).
    """
    with torch.enable_grad():
        cost = cost.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(soft_dtw(cost, gamma, student_lengths, teacher_lengths).sum(), cost)
    return gradient


def _end_probabilities(pairs: EncodedPairs, *sides: ModelSide) -> list[float]:
    whole = torch.tensor([not row.truncated for row in pairs.rows])
    found = []
    for side in sides if whole.any() else ():
        nats = head_loss([constant_rows(side)], CrossEntropy(side.target_ids), by_row=True).terms["ce"]
        found.append(float((-nats[side.lengths.cumsum(0) - 1][whole]).exp().mean()))
    return found
