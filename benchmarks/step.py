"""Measure the time of a whole training step (forward, loss, backward, AdamW) of dwakd and of plain implementations.

All contestants run in one process. In each round every contestant makes one step, in random order. The results are
medians and ratios. Compare ratios, because seconds depend on the machine. Contestants:

  products               forward and backward of the student's body, forward of the teacher's body, and the matrix
                         products of the heads: 5 with the student's head and 3 with the teacher's, each over all
                         response tokens at once
  head_products          the matrix products of the heads alone
  sft_all_positions      cross-entropy in plain torch, logits of all positions
  sft_response           cross-entropy in plain torch, logits of response tokens
  published_dskd         DSKD as published: four logit tensors over all positions
  published_dwa_kd       DWA-KD as published: the same, aligned one example at a time
  response_dskd          DSKD in plain torch with response tokens selected first
  sft, dskd, dwa_kd      dwakd's losses with the teacher's forward pass
  dwa_kd_cached          dwa_kd with precomputed teacher hidden states, as from a cache
  dwa_kd_loss            dwa_kd's loss and its backward pass alone, from precomputed hidden states
  sft_head               sft, plus the teacher's forward pass and one product with its head
  uld, min_ed, multilevel_ot, alm, gold, dskd_v2, dwa_kd_v2, cdm, sra
                         dwakd's other losses with the teacher's forward pass; sra also reads its attention
  uld_loss, gold_loss    these losses and their backward pass alone
  trl_uld, trl_gold, trl_uld_loss, trl_gold_loss
                         the same with TRL's ULD loss (plain, and the hybrid of GOLD) on full logits of response tokens
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contest import CORE, NAMES, Contest, able
from benchmarks.workload import Sizes, add_options, sizes_of, write

RATIOS = (
    ("dwa_kd", "products"),
    ("dwa_kd_loss", "head_products"),
    ("dwa_kd", "published_dskd"),
    ("dwa_kd_cached", "published_dskd"),
    ("dwa_kd", "published_dwa_kd"),
    ("dwa_kd", "response_dskd"),
    ("dskd", "response_dskd"),
    ("dwa_kd_cached", "sft_response"),
    ("sft", "sft_response"),
    ("response_dskd", "published_dskd"),
    ("trl_uld", "uld"),
    ("trl_uld_loss", "uld_loss"),
    ("trl_gold", "gold"),
    ("trl_gold_loss", "gold_loss"),
)
"""Pairs of contestants whose ratio is reported."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(sizes: Sizes, names: Sequence[str], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of each step by contestant, without the first round, which is a warm-up."""
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
    """Print a measurement and return it for the JSON file."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(sizes)
    for name, value in medians.items():
        print(f"  {name:20s} {value:8.3f} s   {min(seconds[name]):.3f} to {max(seconds[name]):.3f}")
    ratios = {}
    for a, b in RATIOS:
        if a in medians and b in medians:
            ratios[f"{a} / {b}"] = medians[a] / medians[b]
            print(f"  {a + ' / ' + b:36s} {medians[a] / medians[b]:6.3f}")
    return {"sizes": dataclasses.asdict(sizes), "median_seconds": medians, "ratios": ratios, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contestant; default %(default)s")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=CORE, metavar="NAME", help="default: those above sft_head"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall, or cpu: the process's processor time, for shared machines with --threads 1; default %(default)s",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = able(options.only)
    results = [
        report(sizes, measure(sizes, names, options.rounds, CLOCKS[options.clock])) for sizes in sizes_of(options)
    ]
    print("written to", write("step", results, options))


if __name__ == "__main__":
    main()
