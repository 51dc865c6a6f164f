"""Compare training with FSDP2 on a mesh of gloo ranks with one process. test_fsdp.py runs this module in a subprocess."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import dwakd.kernels.head_loss as engine
from dwakd import DistillTrainer
from dwakd.training.end_of_run import end_of_run
from dwakd.training.teachers import MicroBatch, run_teachers
from tests.training.builders import trainer

STEPS = 2


class Collectives(TorchDispatchMode):
    """Count the collective operations. (torch's CommDebugMode fails on gradient checkpointing.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until the DTensor calls a function on its shards
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Case(NamedTuple):
    """A method, the number of collective operations in a step, and how the student is sharded."""

    method: str
    num_collectives: int
    units: str = "layers"
    """The units of FSDP besides the Distiller: "layers", "student" (layers and student) or "matrices" (layers and both
    matrices with the vocabulary)."""
    options: Mapping[str, Any] = MappingProxyType({})


CASES = [
    # two layers and the rest: 3 gathers in the forward pass, 2 of the layers in the backward pass, 3 reductions
    Case("sft", 8, options={"student": "qwen2", "gradient_checkpointing": True}),
    Case("dwa_kd", 8, options={"padding_free": True}),
    Case("dwa_kd", 15, "student", {"student": "qwen2", "loss_options": {"variant": "recommended"}}),
    Case("uld", 17, "matrices"),
    Case("alm", 7, options={"lora": True}),  # the rest has no gradient
]


def micro_batch(run: DistillTrainer, start: int, stop: int) -> MicroBatch:
    """Return a batch of rows, whose teachers have the statistics of the whole batch."""
    whole, own = (run.data_collator([run.train_dataset[n] for n in rows]) for rows in (range(8), range(start, stop)))
    ((_, _, scales),) = run_teachers([whole], run.teachers, None)
    ((batch, sides, _),) = run_teachers([own], run.teachers, None)
    return MicroBatch(batch, sides, scales)


def train(
    module: Any, optimizer: Any, batch: MicroBatch, num_tokens: int, factor: int
) -> tuple[torch.Tensor, list[int]]:
    """Return the loss of each step, and the number of collective operations in each step."""
    losses, counts = [], []
    for _ in range(STEPS):
        with Collectives() as collectives:
            loss = module(batch.batch.student, batch.sides, batch.scales, num_tokens)["loss"]
            (loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        counts.append(len(collectives.names))
        engine.BUDGET_BYTES = 20_000  # several chunks in each later step
    engine.BUDGET_BYTES = 2**27
    return torch.stack(losses), counts


def shard(module: Any, units: str, mesh: Any, **options: Any) -> Any:
    """Shard a Distiller in place."""
    student = module.student
    layers = [part for part in student.modules() if type(part).__name__ in module._no_split_modules]
    assert len(layers) == 2
    inner = {"student": [student], "matrices": [student.get_input_embeddings(), student.get_output_embeddings()]}
    for part in [*layers, *inner.get(units, []), module]:
        fully_shard(part, mesh=mesh, **options)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return module


def check(case: Case, mesh: Any, folder: Path) -> None:
    """Train a case on all ranks and in this process alone, and compare."""
    rank, count = mesh.get_local_rank(), mesh.size()
    run = trainer(folder, method=case.method, **case.options)
    one = run.model.double().train()
    teachers: list[Any] = run.teachers
    for teacher in teachers:
        teacher.model.double()
    if case.options.get("gradient_checkpointing"):
        one.student.gradient_checkpointing_enable()
    sharded = shard(copy.deepcopy(one), case.units, mesh)
    whole, own = micro_batch(run, 0, 8), micro_batch(run, rank * 8 // count, (rank + 1) * 8 // count)
    num_tokens = sum(whole.batch.student.num_rows)
    optimizers = (
        torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2) for module in (one, sharded)
    )
    expected, _ = train(one, next(optimizers), whole, num_tokens, 1)
    losses, counts = train(sharded, next(optimizers), own, num_tokens, count)
    torch.distributed.all_reduce(losses)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert counts == [case.num_collectives] * STEPS, f"{case}: {counts}"  # they do not grow with the number of chunks
    for (name, parameter), other in zip(sharded.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.full_tensor(), other, rtol=0, atol=1e-9, msg=f"{case}, {name}: {{}}".format
        )


def check_bfloat16(mesh: Any, folder: Path) -> None:
    """With float32 weights that are gathered in bfloat16, the loss is that of a bfloat16 model to the last bit."""
    one = trainer(folder, method="dwa_kd")
    batch = micro_batch(one, mesh.get_local_rank() * 2, mesh.get_local_rank() * 2 + 2)
    inputs = batch.batch.student, batch.sides, batch.scales, torch.tensor(1001.0)
    twin = copy.deepcopy(one.model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = twin(*inputs)["loss"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    sharded = shard(one.model, "layers", mesh, mp_policy=policy)
    loss = sharded(*inputs)["loss"]
    assert loss.dtype == torch.float32, loss.dtype
    assert torch.equal(loss, expected), (loss, expected)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.full_tensor().any() for p in sharded.parameters())


def check_teacher(mesh: Any, folder: Path) -> None:
    """A sharded teacher gives the side of the same teacher on one process."""
    run = trainer(folder, method="alm", teacher="qwen2")
    teacher: Any = run.teachers[0]
    rank = mesh.get_local_rank()
    (tokens,) = run.data_collator([run.train_dataset[n] for n in range(2 * rank, 2 * rank + 2)]).teachers
    expected = teacher.side(tokens)
    for part in [*teacher.model.model.layers, teacher.model]:
        fully_shard(part, mesh=mesh)
    assert isinstance(teacher.model.lm_head.weight, DTensor)
    for _ in range(2):
        side = teacher.side(tokens)
        torch.testing.assert_close(side.hidden, expected.hidden, rtol=0, atol=1e-5)
        for got, wanted in (
            (side.head.weight, expected.head.weight),
            (side.target_embeddings, expected.target_embeddings),
        ):
            assert not isinstance(got, DTensor)
            assert torch.equal(got, wanted)


def run_rank(rank: int, count: int, folder: Path) -> None:
    """Run one of several ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count
    )
    mesh = init_device_mesh("cpu", (count,))
    for case in CASES:
        check(case, mesh, folder)
    check_bfloat16(mesh, folder)
    check_teacher(mesh, folder)
    end_of_run()


if __name__ == "__main__":
    for count in (2, 4):  # forked, so that torch and transformers are imported once
        start_processes(run_rank, (count, Path(sys.argv[1])), nprocs=count, start_method="fork")
