"""Measure forward and backward of Soft-DTW and its peers in one process, in random order; results are medians.

python -m benchmarks.soft_dtw [--rounds 5] [--threads 1] [--gamma 1] [--output benchmarks/results/soft_dtw.json]

With one thread, the clock is the processor time of the process, which other load on the machine hardly changes. With
more threads, it is wall-clock time.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from benchmarks import soft_dtw_peers
from dwakd.kernels import soft_dtw
from dwakd.losses.alignment import soft_dtw_divergences

Numbers = dict[str, float]

EQUAL = [(8, 32), (8, 128), (8, 256), (8, 512)]
GROWTH = [(8, 64), (8, 1024), (1, 256), (32, 256), (2, 2048)]
GAMMAS = (1e-2, 1e-1, 1.0, 10.0, 1e2, 1e4)


def ours(impl: str) -> soft_dtw_peers.Peer:
    return lambda cost, gamma, x_lengths, y_lengths: soft_dtw(cost, gamma, x_lengths, y_lengths, impl=impl)


def autograd_loop(cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    """Compute Soft-DTW by anti-diagonals in plain torch with autograd; supports equal lengths only."""
    batch, n, m = cost.shape
    before, last = cost.new_full((2, batch, n + 1), torch.inf)
    before = torch.cat((cost.new_zeros(batch, 1), before[:, 1:]), 1)
    for k in range(n + m - 1):
        first, end = max(0, k - m + 1), min(n, k + 1)
        rows = torch.arange(first, end)
        three = torch.stack((last[:, first:end], last[:, first + 1 : end + 1], before[:, first:end]))
        reached = cost[:, rows, k - rows] - gamma * (three / -gamma).logsumexp(0)
        outside = (cost.new_full((batch, first + 1), torch.inf), cost.new_full((batch, n - end), torch.inf))
        before, last = last, torch.cat((outside[0], reached, outside[1]), 1)
    return last[:, n]


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> Numbers:
    """Return the median milliseconds of each call, after one warm-up round; a matrix product precedes each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    matrix = torch.rand(256, 256)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(rounds + 1):
        for name in random.sample(sorted(calls), len(calls)):
            matrix @ matrix
            start = clock()
            calls[name]()
            if turn > 0:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def differentiated(peer: soft_dtw_peers.Peer, cost: Tensor, gamma: float, *lengths: Tensor) -> tuple[Tensor, Tensor]:
    cost = cost.detach().requires_grad_()
    value = peer(cost, gamma, *lengths)
    (grad,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), grad


def kernel_times(peers: dict[str, soft_dtw_peers.Peer], gamma: float, rounds: int) -> dict[str, Numbers]:
    table = {}
    for batch, length in [*EQUAL, *GROWTH]:
        cost, sizes = torch.rand(batch, length, length) * 2, torch.full((batch,), length)
        chosen = peers if (batch, length) in EQUAL else {"ours": peers["ours"]}
        chosen = {name: peer for name, peer in chosen.items() if name != "autograd_loop" or length <= 128}
        table[f"{batch} x {length}"] = timed(chosen, cost, gamma, sizes, sizes, rounds)
        print(f"{batch} x {length}", table[f"{batch} x {length}"], file=sys.stderr, flush=True)
    x_lengths, y_lengths = torch.randint(60, 141, (2, 48))
    cost = torch.rand(48, int(x_lengths.max()), int(y_lengths.max())) * 2
    chosen = {name: peer for name, peer in peers.items() if name not in ("tslearn", "autograd_loop")}
    table["48 ragged, 60 to 140"] = timed(chosen, cost, gamma, x_lengths, y_lengths, rounds)
    return table


def timed(
    peers: dict[str, soft_dtw_peers.Peer], cost: Tensor, gamma: float, x_lengths: Tensor, y_lengths: Tensor, rounds: int
) -> Numbers:
    calls = {
        name: lambda peer=peer: differentiated(peer, cost, gamma, x_lengths, y_lengths) for name, peer in peers.items()
    }
    result = interleaved(calls, rounds)
    cells = int((x_lengths * y_lengths).sum())
    return {**result, "ours_ns_per_cell": 1e6 * result["ours"] / cells}


def accuracy(peers: dict[str, soft_dtw_peers.Peer]) -> dict[str, Numbers]:
    """Return the largest error of a float32 gradient against float64 by gamma, for 4 x 200 x 180 costs from U(0, 2)."""
    cost, sizes = torch.rand(4, 200, 180) * 2, (torch.full((4,), 200), torch.full((4,), 180))
    errors: dict[str, Numbers] = {}
    for gamma in GAMMAS:
        _, exact = differentiated(ours("naive"), cost.double(), gamma, *sizes)
        found = {name: differentiated(peer, cost, gamma, *sizes)[1] for name, peer in peers.items()}
        errors[f"{gamma:g}"] = {name: (grad.double() - exact).abs().max().item() for name, grad in found.items()}
    return errors


def step_part(gamma: float, rounds: int, width: int) -> Numbers:
    """Measure the alignment loss of a step, ours and as published, for 8 examples and two pairs of sequences."""
    student_lengths, teacher_lengths = torch.randint(60, 141, (2, 8))
    totals = [int(student_lengths.sum()), int(teacher_lengths.sum())] * 2
    rows = [torch.randn(total, width, requires_grad=True) for total in totals]
    band = torch.rand(8, int(student_lengths.max()), int(teacher_lengths.max())).round()

    def batched() -> None:
        pairs = [(rows[0], rows[1]), (rows[2], rows[3])]
        scores = soft_dtw_divergences(pairs, student_lengths, teacher_lengths, gamma=gamma, band=band)
        torch.autograd.grad(torch.cat(list(scores)).sum(), rows)

    def published() -> None:
        total = torch.zeros(())
        for x_rows, y_rows in ((rows[0], rows[1]), (rows[2], rows[3])):
            sides = x_rows.split(student_lengths.tolist()), y_rows.split(teacher_lengths.tolist())
            for x, y, penalty in zip(*sides, band, strict=True):
                scores = [
                    one_score(a, b, gamma, penalty if (a is x and b is y) else None)
                    for a, b in ((x, y), (x, x), (y, y))
                ]
                total = total + scores[0] - (scores[1] + scores[2]) / 2
        torch.autograd.grad(total, rows)

    result = interleaved({"ours": batched, "published_structure": published}, rounds)
    return {**result, "ratio": result["published_structure"] / result["ours"]}


def one_score(x: Tensor, y: Tensor, gamma: float, penalty: Tensor | None) -> Tensor:
    """Make one call as in the published code: cosines by broadcasting over all pairs, then Soft-DTW of an example."""
    cost = 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    if penalty is not None:
        cost = cost + penalty[: len(x), : len(y)]
    return soft_dtw_peers.numba_batched(cost[None], gamma, torch.tensor([len(x)]), torch.tensor([len(y)])).sum()


def signature(options: argparse.Namespace) -> dict[str, Any]:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    names = ("torch", "numba", "numpy", "pysdtw", "tslearn")
    versions = {name: version for name in names if (version := version_of(name))}
    return {
        "commit": git.stdout.strip(), "python": platform.python_version(), "versions": versions, "cpu": cpu[0],
        "cores": len(cpu), "threads": options.threads,
        "clock": "processor" if options.threads == 1 else "wall", "rounds": options.rounds, "seed": options.seed,
        "costs": "U(0, 2)", "gamma": options.gamma, "width": options.width,
    }  # fmt: skip


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report(table: dict[str, Numbers], errors: dict[str, Numbers], step: Numbers) -> str:
    names = list(dict.fromkeys(itertools.chain.from_iterable(table.values())))
    names = [name for name in names if name not in ("ours", "ours_ns_per_cell")]
    lines = [f"| case | ours, ms | ns a cell | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for case, times in table.items():
        ratios = [f"{times[name] / times['ours']:.1f} x" if name in times else "" for name in names]
        lines.append(f"| {case} | {times['ours']:.2f} | {times['ours_ns_per_cell']:.1f} | {' | '.join(ratios)} |")
    lines += ["", f"| gamma | {' | '.join(errors['1'])} |", "|---" * (len(errors["1"]) + 1) + "|"]
    lines += [f"| {gamma} | {' | '.join(f'{error:.1e}' for error in row.values())} |" for gamma, row in errors.items()]
    part = (
        f"{step['ours']:.1f} ms, in the published structure {step['published_structure']:.0f} ms: {step['ratio']:.0f} x"
    )
    return "\n".join([*lines, "", f"DTW part of a step: {part}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each peer and case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and numba")
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--width", type=int, default=256, help="hidden size in the alignment loss of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soft_dtw.json"), help="JSON file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    others, absent = soft_dtw_peers.available()
    for line in absent:
        print(line)
    compared = {"ours": ours("auto"), "ours_plain_torch": ours("naive"), **others}
    table = kernel_times({**compared, "autograd_loop": autograd_loop}, options.gamma, options.rounds)
    errors, step = accuracy(compared), step_part(options.gamma, options.rounds, options.width)
    print(report(table, errors, step))
    result = {"signature": signature(options), "milliseconds": table, "gradient_error": errors, "dtw_part": step}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
