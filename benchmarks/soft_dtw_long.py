"""Measure the Soft-DTW part of a step for one long example: full tables against bands of 512 columns.

python -m benchmarks.soft_dtw_long [--output benchmarks/results/soft_dtw_long.json]

Each case runs in its own process on one thread: forward and backward of two pairs of sequences, six tables in all. The time
is the processor time of the process, the median of the repetitions. The memory is the peak resident size during the first
one above the size before it. The error is the largest difference of the gradient from that of the full tables, divided by
their largest entry; for 8,192 tokens, from bands that cover the tables. Requires Linux, because it reads /proc.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import resident
from benchmarks.soft_dtw import signature
from dwakd.losses.alignment import soft_dtw_divergences
from dwakd.losses.attention import Focus
from dwakd.losses.band import Band
from dwakd.losses.banded import banded_divergences

CASES = [(2048, "full"), (2048, "band"), (4096, "full"), (4096, "band"), (8192, "cover"), (8192, "band")]
BAND = 512


def example(length: int, width: int, seed: int) -> tuple[list[tuple[Tensor, Tensor]], Band]:
    """Return two pairs of sequences, one similar and one unrelated, and a band around an attention near the alignment."""
    generator = torch.Generator().manual_seed(seed)
    text, *noise = torch.randn(5, length, width, generator=generator)
    wave = 20 * torch.sin(torch.arange(length) / 300)
    warped = text[(torch.arange(length) + wave).round().clamp(0, length - 1).long()]
    pairs = [(text + noise[0], warped + noise[1]), (noise[2].clone(), noise[3].clone())]
    centre = torch.arange(length) + wave + 3 * torch.randn(length, generator=generator)
    focus = Focus(centre[None], torch.ones(1, length))
    counts = torch.tensor([length])
    return [(x.requires_grad_(), y.requires_grad_()) for x, y in pairs], Band.around(focus, counts, counts)


def gradients(kind: str, pairs: list[tuple[Tensor, Tensor]], band: Band) -> tuple[list[Tensor], float]:
    """Return the gradients of the vectors, and the mass on the border of the bands."""
    length, border = len(pairs[0][0]), torch.zeros(1)
    if kind == "full":
        counts = torch.tensor([length])
        scores = soft_dtw_divergences(pairs, counts, counts, gamma=2.0, band=band.penalties(length))
    else:
        width, lengths = BAND if kind == "band" else length, ((length,), (length,))
        scores, border = banded_divergences(pairs, lengths, gamma=2.0, band=band, width=width, max_border=1e-5)
    return list(
        torch.autograd.grad(torch.stack(scores).sum(), [rows for pair in pairs for rows in pair])
    ), border.item()


def child(length: int, kind: str, options: argparse.Namespace, path: Path) -> None:
    """Measure one case, and write its gradients to `path`."""
    torch.set_num_threads(1)
    gradients(kind, *example(64, options.width, 0))  # compile
    pairs, band = example(length, options.width, options.seed)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, seconds = resident("VmRSS"), []
    for turn in range(1 if kind == "cover" else options.rounds):
        start = time.process_time()
        grads, border = gradients(kind, pairs, band)
        seconds.append(time.process_time() - start)
        if turn == 0:
            peak = resident("VmHWM") - before
            torch.save(grads, path)
        del grads
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": peak, "border": border}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each case")
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soft_dtw_long.json"), help="JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(int(options.child[0]), options.child[1], options, Path(options.child[2]))
        return
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference: list[Tensor] = []
        for length, kind in CASES:
            path = Path(folder, "gradients")
            command = [sys.executable, "-m", "benchmarks.soft_dtw_long", "--child", str(length), kind, str(path)]
            command += [f"--{name}={getattr(options, name)}" for name in ("rounds", "width", "seed")]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            grads = torch.load(path)
            if kind == "band":
                pairs = zip(grads, reference, strict=True)
                found["error"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
                whole = cases[f"{length}, {'cover' if length == 8192 else 'full'}"]
                found |= {f"{name}_ratio": found[name] / whole[name] for name in ("seconds", "bytes")}
            reference = grads
            cases[f"{length}, {kind}"] = found
            print(length, kind, found, flush=True)
    options.threads, options.gamma = 1, 2.0
    result = {"signature": {**signature(options), "costs": "cosine", "columns": BAND}, "cases": cases}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
