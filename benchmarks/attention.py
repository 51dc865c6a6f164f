"""Measure the attention between two models for one long example: whole matrices against blocks of rows.

python -m benchmarks.attention [--output benchmarks/results/attention.json]

Each case runs in its own process on one thread: forward and backward pass of `cross_model_attention` in float32. The time is
the processor time of the process. The memory is the peak resident size above the size before, after a small example has loaded
what torch loads at its first use. Requires Linux, because it reads /proc.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.memory import resident
from benchmarks.workload import signature
from dwakd.batch import ModelSide, OutputHead
from dwakd.losses import TeacherScale, sides
from dwakd.losses.attention import Projectors, cross_model_attention
from dwakd.losses.pair import Widths

LENGTHS, KINDS = (4096, 8192), ("whole", "blocks")


def example(length: int, width: int) -> ModelSide:
    """Return random states and embeddings of one response."""
    hidden, read, targets = torch.randn(3, length, width)
    places, head = torch.arange(length), OutputHead(torch.empty(1, width))
    lengths = torch.tensor([length])
    return ModelSide(hidden.requires_grad_(), read, targets, places * 0, lengths, places + 1, head)


def run(length: int, width: int) -> None:
    """Compute the attention in both directions, and all gradients."""
    maps = Projectors(Widths(width, width, width, width), with_embedding=False)
    student, teacher = example(length, width), example(length, width)
    found = cross_model_attention(student, teacher, maps, TeacherScale.of(teacher))
    (found.t2s_hidden.square().sum() + found.s2t_hidden.square().sum()).backward()


def child(length: int, kind: str, width: int) -> None:
    """Measure one case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides.LONG = 0
    run(64, width)
    sides.LONG = length if kind == "whole" else 0
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, start = resident("VmRSS"), time.process_time()
    run(length, width)
    print(json.dumps({"seconds": time.process_time() - start, "bytes": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--width", type=int, default=256, help="width of states and embeddings; default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(int(options.child[0]), options.child[1], options.width)
        return
    torch.set_num_threads(1)
    results = []
    for length in LENGTHS:
        for kind in KINDS:
            asked = ["--child", str(length), kind, "--width", str(options.width)]
            command = [sys.executable, "-m", "benchmarks.attention", *asked]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            results.append({"length": length, "kind": kind, **found})
            print(f"{length:6d} {kind:7s} {found['seconds']:6.1f} s {found['bytes'] / 2**20:7.0f} MiB", flush=True)
    content = {"signature": signature(options), "results": results}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
