"""Measure the time of an optimiser step per token that the student reads, for each way to save padding.

All contestants run in one process. In each round every contestant makes one optimiser step on its next rows, in random
order, collation included. Each contestant takes the rows of a data file, encoded with two real tokenizers, and trains its
own copy of a student with random weights. The results are the total time divided by the tokens without padding, and ratios
to `padded`. Compare ratios, because seconds depend on the machine. Ways to make batches:

  padded           the rows of a step as one batch, in random order
  group_by_length  training.train_sampling_strategy: group_by_length
  by_tokens        training.max_tokens_per_batch, in random order
  padding_free     the same with training.padding_free

    python -m benchmarks.padding rows.jsonl --tokenizers STUDENT TEACHER --methods sft dwa_kd
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.workload import Sizes, add_options, build_student, build_teacher, sizes_of, write
from dwakd.batch import PairedBatch
from dwakd.data.collator import collate
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.sources import load_examples
from dwakd.losses import Widths, build_loss
from dwakd.training.distiller import Distiller
from dwakd.training.sampler import LengthGroupedSampler, split_by_tokens
from dwakd.training.teacher import OnlineTeacher
from dwakd.training.teachers import run_teachers

WAYS = ("padded", "group_by_length", "by_tokens", "padding_free")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def encoded_rows(options: argparse.Namespace) -> EncodedPairs:
    """Encode the first rows of the data file."""
    encoders = [TextEncoder(AutoTokenizer.from_pretrained(name), "plain") for name in options.tokenizers]
    return encode_pairs(load_examples(options.data)[: options.rows], *encoders, invalid_rows="skip")


def steps_of(pairs: EncodedPairs, way: str, sizes: Sizes) -> Iterator[PairedBatch]:
    """Yield the rows of each optimiser step as one batch, epoch after epoch."""
    epoch = 0
    while True:
        order = list(range(len(pairs)))
        random.Random(epoch).shuffle(order)
        if way == "group_by_length":
            order = list(LengthGroupedSampler(pairs.student_lengths, sizes.batch, epoch, lambda: 0))
        for start in range(0, len(order) - sizes.batch + 1, sizes.batch):
            yield collate([pairs[row] for row in order[start : start + sizes.batch]])
        epoch += 1


def contestant(
    way: str, method: str, pairs: EncodedPairs, teacher: OnlineTeacher, sizes: Sizes, max_tokens: int
) -> Callable[[], tuple[int, int]]:
    """Return a function that makes a step, and returns its number of tokens without and with padding."""
    widths = Widths(sizes.student_hidden, sizes.teacher_hidden, sizes.student_hidden, sizes.teacher_hidden)
    distiller = Distiller(build_student(sizes), build_loss(method, widths=widths), packed=way == "padding_free")
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4, fused=True)  # as the trainer does
    steps = steps_of(pairs, way, sizes)
    teachers = [] if method == "sft" else [teacher]

    def step() -> tuple[int, int]:
        batch = next(steps)
        parts = split_by_tokens([batch], max_tokens, None) if way in ("by_tokens", "padding_free") else [batch]
        num_tokens = float(sum(batch.student.num_rows))
        for micro, sides, scales in run_teachers(parts, teachers, None):
            distiller(micro.student, sides, scales, num_tokens)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.student.num_tokens)
        return tokens, tokens if distiller.packed else sum(part.student.input_ids.numel() for part in parts)

    return step


def measure(method: str, pairs: EncodedPairs, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the ways with one method. The first round is a warm-up and is not counted."""
    clock, teacher = CLOCKS[options.clock], OnlineTeacher(build_teacher(sizes))
    steps = {way: contestant(way, method, pairs, teacher, sizes, options.max_tokens) for way in WAYS}
    totals = {way: [0.0, 0.0, 0.0] for way in WAYS}
    order = list(WAYS)
    for turn in range(options.rounds + 1):
        random.Random(turn).shuffle(order)
        for way in order:
            start = clock()
            tokens, padded = steps[way]()
            new = clock() - start, tokens, padded
            if turn:
                totals[way] = [total + value for total, value in zip(totals[way], new, strict=True)]
    found = {way: seconds / tokens for way, (seconds, tokens, _) in totals.items()}
    return {
        "method": method,
        "microseconds_per_token": {way: 1e6 * value for way, value in found.items()},
        "ratios": {way: value / found["padded"] for way, value in found.items()},
        "share_of_tokens": {way: tokens / padded for way, (_, tokens, padded) in totals.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.padding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="jsonl file of rows with prompt and response")
    parser.add_argument("--tokenizers", nargs=2, required=True, metavar=("STUDENT", "TEACHER"))
    add_options(parser, batch=16)
    parser.add_argument("--methods", nargs="+", default=["sft", "dwa_kd"], help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=1024, help="max_tokens_per_batch; default %(default)s")
    parser.add_argument("--rows", type=int, default=1000, help="rows of the data set; default %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each contestant; default %(default)s")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the processor time of the process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs, (sizes,) = encoded_rows(options), sizes_of(options)
    results = [measure(method, pairs, sizes, options) for method in options.methods]
    for result in results:
        print(result["method"], *(f"{way} {ratio:.3f}" for way, ratio in result["ratios"].items()))
    print("written to", write("padding", results, options))


if __name__ == "__main__":
    main()
