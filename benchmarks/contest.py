"""Build the training steps that `benchmarks.step` and `benchmarks.memory` measure, by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import plain, trl_peer
from benchmarks.workload import Sizes, build_batch, build_student, build_teacher, build_tokens
from dwakd.batch import TokenBatch
from dwakd.losses import METHODS, DistillationLoss, ModelPair, Widths, build_loss, method_options
from dwakd.losses.attention import Projectors
from dwakd.models.head import output_head
from dwakd.models.rows import response_side
from dwakd.training.distiller import Distiller
from dwakd.training.teacher import OnlineTeacher

Step = Callable[[], Tensor | None]
CORE = (
    "products",
    "head_products",
    "sft_all_positions",
    "sft_response",
    "published_dskd",
    "published_dwa_kd",
    "response_dskd",
    "sft",
    "dskd",
    "dwa_kd",
    "dwa_kd_cached",
    "dwa_kd_loss",
)
OURS = tuple(name for name in METHODS if not method_options(name).needs_same_vocabulary)
"""Methods for models with different vocabularies."""
NAMES = (
    *CORE,
    "sft_head",
    *(name for name in OURS if name not in CORE),
    "uld_loss",
    "trl_uld",
    "trl_uld_loss",
    "gold_loss",
    "trl_gold",
    "trl_gold_loss",
)


class Contest:
    """Build the steps of one size. Each contestant trains its own copy of the student."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.batch = build_batch(sizes)
        self.teacher = OnlineTeacher(build_teacher(sizes))
        self.widths = Widths(sizes.student_hidden, sizes.teacher_hidden, sizes.student_hidden, sizes.teacher_hidden)

    def step(self, name: str) -> Step:
        """Return the step of a contestant."""
        if name in ("products", "head_products"):
            return self._products(models=name == "products")
        if name.startswith("trl_"):
            return self._trl(name.removeprefix("trl_"))
        if name.endswith("_loss"):
            return self._loss_alone(name.removesuffix("_loss"))
        student = build_student(self.sizes)
        if name == "sft_head" or name.removesuffix("_cached") in METHODS:
            return self._ours(name, student)
        function = getattr(plain, name)
        if name.startswith("sft"):
            return self._optimised(student, lambda: function(student, self.batch))
        projectors = Projectors(self.widths, with_embedding=name == "published_dwa_kd")
        module = nn.ModuleList([student, projectors])
        return self._optimised(module, lambda: function(student, self.teacher.model, projectors, self.batch))

    def loss(self, method: str, student: nn.Module) -> DistillationLoss[Any]:
        """Build dwakd's loss of a method for this student and the teacher."""
        pair = ModelPair(self.widths, *build_tokens(self.sizes), output_head(student).detached(), self.teacher.head)
        return build_loss(method, widths=self.widths, pair=pair)

    def _optimised(self, module: nn.Module, loss: Callable[[], Tensor]) -> Step:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)  # as the trainer does

        def step() -> Tensor:
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.detach()

        return step

    def _ours(self, name: str, student: nn.Module) -> Step:
        distiller = Distiller(student, self.loss(name.removesuffix("_cached").removesuffix("_head"), student))
        teacher = OnlineTeacher(self.teacher.model)
        teacher.with_attention = distiller.loss.needs_attention
        given = teacher.side(*self.batch.teachers) if name.endswith("_cached") else None

        def loss() -> Tensor:
            rows = None if name == "sft" else given or teacher.side(*self.batch.teachers)
            value: Tensor = distiller(self.batch.student, [] if rows is None else [rows])["loss"]
            if name == "sft_head":
                assert rows is not None
                with torch.no_grad():
                    torch.mm(rows.head.weight, rows.hidden.t())
            return value

        return self._optimised(distiller, loss)

    def _loss_alone(self, method: str) -> Step:
        model = build_student(self.sizes)
        loss, teacher = self.loss(method, model), self.teacher.side(*self.batch.teachers)
        with torch.no_grad():
            rows = response_side(model, self.batch.student)
        student = dataclasses.replace(
            rows,
            hidden=rows.hidden.detach().requires_grad_(),
            target_embeddings=rows.target_embeddings.detach().requires_grad_(),
        )
        leaves = student.hidden, student.target_embeddings, student.head.weight
        return _differentiated(lambda: loss(student, teacher).loss, [*leaves, *loss.parameters()])

    def _trl(self, name: str) -> Step:
        models = build_student(self.sizes), self.teacher.model
        criterion = trl_peer.criterion(name.removesuffix("_loss"), self.sizes)
        if not name.endswith("_loss"):
            return self._optimised(models[0], lambda: trl_peer.step_loss(criterion, models, self.batch))
        with torch.no_grad():
            own, theirs = (
                trl_peer.hidden_window(model, tokens) for model, tokens in zip(models, self.batch, strict=True)
            )
        own.requires_grad_()
        return _differentiated(
            lambda: trl_peer.loss_of_windows(criterion, (own, theirs), models, self.batch),
            [own, models[0].get_output_embeddings().weight],
        )

    def _products(self, *, models: bool) -> Step:
        student = build_student(self.sizes)
        teacher = self.teacher.model
        mask, t_mask = (tokens.response_mask for tokens in self.batch)
        weight, t_weight = (m.get_output_embeddings().weight.detach() for m in (student, teacher))
        ones = torch.ones(int(mask.sum()), weight.shape[1])
        t_ones = torch.ones(int(t_mask.sum()), t_weight.shape[1])

        def body(model: PreTrainedModel, tokens: TokenBatch) -> Tensor:
            return model.base_model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state

        def step() -> None:
            if models:
                body(student, self.batch.student)[mask].backward(ones)
                student.zero_grad(set_to_none=True)
                with torch.no_grad():
                    body(teacher, *self.batch.teachers)
            for rows, head, trains in ((ones, weight, True), (t_ones, t_weight, False)):
                for side in ("own", "projected"):
                    logits = torch.mm(head, rows.t())
                    if trains or side == "projected":
                        torch.mm(logits.t(), head)
                    if trains and side == "own":
                        torch.mm(logits, rows)
                    del logits

        return step


def _differentiated(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Step:
    def step() -> Tensor:
        value = loss()
        value.backward()
        for leaf in leaves:
            leaf.grad = None
        return value.detach()

    return step


def able(names: Sequence[str]) -> list[str]:
    """Return the contestants that can run; print one line if a peer is not installed."""
    reason = trl_peer.absent() if any(name.startswith("trl_") for name in names) else None
    if reason:
        print(reason)
    return [name for name in names if not (reason and name.startswith("trl_"))]
