"""Measure the peak memory of a training step above the weights of student and teacher.

Each contestant runs in its own process. The result is the peak resident size over two steps, including gradients and
AdamW's moments, minus the resident size before the first step, after libraries and models are loaded. The contestants
are described in `benchmarks.step --help`. Requires Linux, because it reads /proc.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba  # noqa: F401, loaded before the measurement
import torch

from benchmarks.contest import NAMES, Contest, able
from benchmarks.workload import Sizes, add_options, sizes_of, write

DEFAULT = [name for name in NAMES if name not in ("products", "head_products", "dwa_kd_loss")]
STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Return this process's VmRSS (current resident size) or VmHWM (its peak) in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of_two_steps(sizes: Sizes, name: str) -> int:
    """Return the peak in bytes above the resident size after the models are built."""
    step = Contest(sizes).step(name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    for _ in range(2):
        step()
    return resident("VmHWM") - before


def in_a_child(sizes: Sizes, name: str, threads: int) -> int | None:
    """Measure the peak in a new process; return None if the process fails, for example because memory runs out."""
    asked = json.dumps({"sizes": dataclasses.asdict(sizes), "name": name, "threads": threads})
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--child", asked], capture_output=True, text=True, check=False
    )
    if child.returncode:
        print(child.stderr[-500:], file=sys.stderr)
        return None
    return int(child.stdout.split()[-1])


def report(sizes: Sizes, names: list[str], threads: int) -> dict[str, Any]:
    """Measure, print and return the peaks of one size."""
    print(sizes)
    peaks: dict[str, int | None] = {}
    for name in names:
        peaks[name] = peak = in_a_child(sizes, name, threads)
        print(f"  {name:20s}", "out of memory" if peak is None else f"{peak / 1e9:8.3f} GB", flush=True)
    known = {name: peak for name, peak in peaks.items() if peak}
    pairs = [*((name, "published_dskd") for name in known), *((f"trl_{name}", name) for name in known)]
    ratios = {f"{a} / {b}": known[a] / known[b] for a, b in pairs if a in known and b in known}
    for name, ratio in ratios.items():
        print(f"  {name:36s} {ratio:6.3f}")
    return {"sizes": dataclasses.asdict(sizes), "peak_bytes": peaks, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, batch=8)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=DEFAULT, metavar="NAME", help="contestants to measure"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        asked = json.loads(options.child)
        torch.set_num_threads(asked["threads"])
        print(peak_of_two_steps(Sizes(**asked["sizes"]), asked["name"]))
        return
    names = able(options.only)
    results = [report(sizes, names, options.threads) for sizes in sizes_of(options)]
    print("written to", write("memory", results, options))


if __name__ == "__main__":
    main()
