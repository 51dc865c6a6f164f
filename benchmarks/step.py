"""Time of a whole training step: forward, loss, backward, AdamW; ours beside plain readings of the papers.

All contestants run in one process, one step each in an order shuffled anew every round; reported are medians and
ratios. Compare ratios: seconds swing with the machine. Contestants:

  products               student body both ways, teacher body forward, and the heads' products alone: 5 with the
                         student's head, 3 with the teacher's, over all response rows at once
  head_products          only the latter
  sft_all_positions      plain cross-entropy, logits at every position
  sft_response           plain cross-entropy, logits of response rows
  published_dskd         DSKD as published: four logit tensors over all positions
  published_dwa_kd       DWA-KD likewise, aligned one example at a time
  response_dskd          DSKD with response rows selected first, otherwise plain
  sft, dskd, dwa_kd      dwakd's losses with the teacher's forward
  dwa_kd_cached          the teacher's rows given, as from a cache
  dwa_kd_loss            the loss and its backward alone, from given rows
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.workload import (
    Sizes,
    add_options,
    build_batch,
    build_student,
    build_teacher,
    sizes_of,
    write,
)
from dwakd.batch import ModelSide
from dwakd.losses import Widths, build_loss
from dwakd.losses.projectors import Projectors
from dwakd.training.distiller import Distiller
from dwakd.training.teacher import OnlineTeacher, side_rows

Step = Callable[[], Tensor | None]
RATIOS = (
    ("dwa_kd", "products", 1.25),
    ("dwa_kd_loss", "head_products", None),
    ("dwa_kd", "published_dskd", 0.22),
    ("dwa_kd_cached", "published_dskd", 0.17),
    ("dwa_kd", "published_dwa_kd", None),
    ("dwa_kd", "response_dskd", 0.8),
    ("dskd", "response_dskd", None),
    ("dwa_kd_cached", "sft_response", 4.0),
    ("sft", "sft_response", None),
    ("response_dskd", "published_dskd", None),
)
"""Contestants whose ratio is reported, and what we aim at with the default sizes."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Contest:
    """The steps of one size; each contestant trains its own copy of the student."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.batch = build_batch(sizes)
        self.teacher = OnlineTeacher(build_teacher(sizes))
        self.widths = Widths(sizes.student_hidden, sizes.teacher_hidden, sizes.student_hidden, sizes.teacher_hidden)

    def step(self, name: str) -> Step:
        """The step of a contestant by its name."""
        if name in ("products", "head_products"):
            return self._products(models=name == "products")
        if name == "dwa_kd_loss":
            return self._loss_alone()
        student = build_student(self.sizes)
        if name in ("sft", "dskd", "dwa_kd", "dwa_kd_cached"):
            return self._ours(name, student)
        function = getattr(plain, name)
        if name.startswith("sft"):
            return self._optimised(student, lambda: function(student, self.batch))
        projectors = Projectors(self.widths, with_embedding=name == "published_dwa_kd")
        module = nn.ModuleList([student, projectors])
        return self._optimised(module, lambda: function(student, self.teacher.model, projectors, self.batch))

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
        method = name.removesuffix("_cached")
        widths = None if method == "sft" else self.widths
        distiller = Distiller(student, build_loss(method, widths=widths))
        rows = self.teacher.rows(self.batch) if name.endswith("_cached") else None

        def loss() -> Tensor:
            teacher = None if method == "sft" else rows or self.teacher.rows(self.batch)
            value: Tensor = distiller(self.batch, teacher)["loss"]
            return value

        return self._optimised(distiller, loss)

    def _loss_alone(self) -> Step:
        loss = build_loss("dwa_kd", widths=self.widths)
        student, teacher = self._student_rows(), self.teacher.rows(self.batch)

        def step() -> Tensor:
            value = loss(student, teacher).loss
            value.backward()
            loss.zero_grad(set_to_none=True)
            for tensor in (student.hidden, student.target_embeddings, student.head.weight):
                tensor.grad = None
            return value.detach()

        return step

    def _student_rows(self) -> ModelSide:
        model = build_student(self.sizes)
        with torch.no_grad():
            rows = side_rows(model, self.batch, "student")
        return dataclasses.replace(
            rows,
            hidden=rows.hidden.detach().requires_grad_(),
            target_embeddings=rows.target_embeddings.detach().requires_grad_(),
        )

    def _products(self, *, models: bool) -> Step:
        student = build_student(self.sizes)
        teacher = self.teacher.model
        mask, t_mask = (self.batch[f"{side}_response_mask"] for side in ("student", "teacher"))
        weight, t_weight = (m.get_output_embeddings().weight.detach() for m in (student, teacher))
        ones = torch.ones(int(mask.sum()), weight.shape[1])
        t_ones = torch.ones(int(t_mask.sum()), t_weight.shape[1])

        def body(model: nn.Module, side: str) -> Tensor:
            ids, attention = self.batch[f"{side}_input_ids"], self.batch[f"{side}_attention_mask"]
            return model.base_model(ids, attention_mask=attention).last_hidden_state

        def step() -> None:
            if models:
                body(student, "student")[mask].backward(ones)
                student.zero_grad(set_to_none=True)
                with torch.no_grad():
                    body(teacher, "teacher")
            for rows, head, trains in ((ones, weight, True), (t_ones, t_weight, False)):
                for side in ("own", "projected"):
                    logits = torch.mm(head, rows.t())
                    if trains or side == "projected":
                        torch.mm(logits.t(), head)
                    if trains and side == "own":
                        torch.mm(logits, rows)
                    del logits

        return step


NAMES = (
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


def measure(sizes: Sizes, names: Sequence[str], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per step, one list per contestant; the first round warms up and is dropped."""
    contest = Contest(sizes)
    steps = {name: contest.step(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def report(sizes: Sizes, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints a measurement and returns it for the JSON file."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(sizes)
    for name, value in medians.items():
        print(f"  {name:20s} {value:8.3f} s   {min(seconds[name]):.3f} to {max(seconds[name]):.3f}")
    ratios = {}
    for a, b, aim in RATIOS:
        if a in medians and b in medians:
            ratios[f"{a} / {b}"] = medians[a] / medians[b]
            print(f"  {a + ' / ' + b:36s} {medians[a] / medians[b]:6.3f}" + (f"   (aim {aim})" if aim else ""))
    return {"sizes": dataclasses.asdict(sizes), "median_seconds": medians, "ratios": ratios, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contestant; default %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="some of them")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall, or cpu: the process's own time, for a shared machine, with --threads 1; default %(default)s",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        report(sizes, measure(sizes, options.only, options.rounds, CLOCKS[options.clock]))
        for sizes in sizes_of(options)
    ]
    print("written to", write("step", results, options))


if __name__ == "__main__":
    main()
