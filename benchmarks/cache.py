"""Measure training from a teacher cache, with the online teacher and with SFT, and the time and size of a cache.

All contestants run in one process. In each round every contestant makes one optimiser step on its next rows, in random
order, collation included. The results are medians and ratios. Compare ratios, because seconds depend on the machine.

  sft          the student alone
  online       dwa_kd, the teacher's forward in every step
  cached       dwa_kd, the teacher's hidden states read from the cache
  dwa_kd_loss  dwa_kd's loss and its backward alone, from given hidden states: the cost of heads and alignment
  sft_loss     the same for SFT

`cached / expected` divides the cached step by the SFT step with dwa_kd's loss instead of SFT's. `cached / sft` divides
it by the SFT step, which also computes logits at response tokens only; it grows with the teacher's vocabulary:
`--vary teacher_vocab 32000 151936`.
"""

import argparse
import dataclasses
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.workload import Sizes, add_options, build_student, build_teacher, sizes_of, write
from dwakd.batch import ModelSide, TokenBatch
from dwakd.cache.build import ModelEngine, open_or_build
from dwakd.cache.store import Cache, CacheRequest
from dwakd.data.collator import collate
from dwakd.data.encoded import EncodedPairs, EncodedRow, EncodedSide
from dwakd.losses import Widths, build_loss
from dwakd.losses.scale import TeacherScale
from dwakd.models.head import embedding_table, output_head
from dwakd.models.rows import response_side
from dwakd.training.distiller import Distiller
from dwakd.training.teacher import OnlineTeacher, Teacher, find_place

NAMES = ("sft", "online", "cached", "dwa_kd_loss", "sft_loss")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class ReadTeacher(Teacher):
    """`CachedTeacher` without its tokenizer and its verification, which are not part of a step."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.table, self.head = cache.teacher()
        self.find_place = partial(find_place, cache)

    def prepare(self, *arguments: Any) -> None:
        return

    def states(self, tokens: TokenBatch) -> tuple[Tensor, None]:
        assert tokens.cache_places is not None
        return self.cache.read(tokens.cache_places).to(self.head.weight.dtype), None


def build_rows(sizes: Sizes, count: int) -> EncodedPairs:
    """Make rows of random tokens, with lengths within 20 percent of the requested ones."""
    draw = np.random.default_rng(sizes.seed)

    def side(vocab: int) -> EncodedSide:
        response = max(int(sizes.response * draw.uniform(0.8, 1.2)), 1)
        prompt = max(int((sizes.length - 1.2 * sizes.response) * draw.uniform(0.6, 1.0)), 1)
        ids = draw.integers(0, vocab, prompt + response, dtype=np.int32)
        return EncodedSide(ids, prompt, np.arange(response, dtype=np.int32))

    rows = [EncodedRow(n, "", side(sizes.student_vocab), (side(sizes.teacher_vocab),)) for n in range(count)]
    return EncodedPairs(rows, {})


class Contest:
    """Make the steps of one size. Each contestant trains its own copy of the student."""

    def __init__(self, sizes: Sizes, pairs: EncodedPairs, online: OnlineTeacher, cached: ReadTeacher) -> None:
        self.sizes = sizes
        self.pairs = pairs
        self.teachers: dict[str, Teacher] = {"online": online, "cached": cached}
        self.caching = partial(collate, find_places=[cached.find_place])
        self.widths = Widths(sizes.student_hidden, sizes.teacher_hidden, sizes.student_hidden, sizes.teacher_hidden)

    def step(self, name: str) -> Callable[[], Any]:
        """Return the step of a contestant."""
        if name.endswith("_loss"):
            return self._loss_alone(name.removesuffix("_loss"))
        student = build_student(self.sizes)
        method = "sft" if name == "sft" else "dwa_kd"
        distiller = Distiller(student, build_loss(method, widths=self.widths))
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4, fused=True)  # as the trainer does
        collate_rows = self.caching if name == "cached" else collate
        features = self._features()

        def step() -> None:
            batch = collate_rows(next(features))
            sides = [self.teachers[name].side(*batch.teachers)] if name in self.teachers else []
            distiller(batch.student, sides, [TeacherScale.of(side) for side in sides])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _features(self) -> Iterator[list[dict[str, Any]]]:
        for start in itertools.count(0, self.sizes.batch):
            yield [self.pairs[(start + n) % len(self.pairs)] for n in range(self.sizes.batch)]

    def _loss_alone(self, method: str) -> Callable[[], Any]:
        loss = build_loss(method, widths=self.widths)
        student = build_student(self.sizes)
        features = self._features()
        with torch.no_grad():
            sides = []
            for _ in range(4):
                batch = self.caching(next(features))
                sides.append((response_side(student, batch.student), self.teachers["cached"].side(*batch.teachers)))
        turns = itertools.cycle(sides)

        def step() -> None:
            rows, teacher = next(turns)
            loss(_learning(rows, student), teacher if method != "sft" else None).loss.backward()
            student.zero_grad(set_to_none=True)
            loss.zero_grad(set_to_none=True)

        return step


def _learning(rows: ModelSide, student: nn.Module) -> ModelSide:
    """Return the same side with hidden states that take a gradient and a head that is trained."""
    return dataclasses.replace(
        rows,
        hidden=rows.hidden.clone().requires_grad_(),
        target_embeddings=rows.target_embeddings.clone().requires_grad_(),
        head=output_head(student),
    )


def measure(sizes: Sizes, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build a cache, then measure the steps. The first round is a warm-up and is not counted."""
    clock = CLOCKS[options.clock]
    pairs = build_rows(sizes, options.rows)
    model = build_teacher(sizes)
    online = OnlineTeacher(model)
    dtype = getattr(torch, options.dtype)
    start = clock()
    cache = open_or_build(
        folder, CacheRequest({"train": pairs}, {}, {}, dtype, progress=False), lambda: ModelEngine(model)
    )
    build_seconds = clock() - start
    contest = Contest(sizes, pairs, online, ReadTeacher(cache))
    steps = {name: contest.step(name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    order = list(NAMES)
    for turn in range(options.rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    expected = medians["sft"] + medians["dwa_kd_loss"] - medians["sft_loss"]
    tokens = sum(row.teachers[0].length for row in pairs.rows)
    kept = sum(cache.index.shard_lengths)
    size = sum(path.stat().st_size for path in folder.glob("shard-*"))
    whole = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    held = {part.data_ptr(): part.nbytes for part in (embedding_table(model), output_head(model).weight)}
    return {
        "sizes": dataclasses.asdict(sizes),
        "median_seconds": medians,
        "ratios": {
            "cached / expected": medians["cached"] / expected,
            "cached / sft": medians["cached"] / medians["sft"],
            "cached / online": medians["cached"] / medians["online"],
        },
        "build": {
            "seconds": build_seconds,
            "teacher_tokens_per_second": tokens / build_seconds,
            "online_steps_to_pay_for_it": build_seconds / max(medians["online"] - medians["cached"], 1e-9),
            "online_steps_in_an_epoch": len(pairs) / sizes.batch,
        },
        "disk": {
            "bytes_per_response_token": cache.token_bytes,
            "bytes_per_response_token_with_headers": size / kept,
            "index_and_head_bytes": sum(path.stat().st_size for path in folder.iterdir()) - size,
        },
        "teacher_bytes_in_memory": {"online": sum(whole.values()), "cached": sum(held.values())},
        "seconds": {name: values[1:] for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--rows", type=int, default=64, help="rows of the data set; default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contestant; default %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the stored hidden states"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the processor time of the process; default wall"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for sizes in sizes_of(options):
        with tempfile.TemporaryDirectory() as folder:
            result = measure(sizes, Path(folder) / "cache", options)
        results.append(result)
        print(sizes)
        for group in ("median_seconds", "ratios", "build", "disk", "teacher_bytes_in_memory"):
            print(f"  {group}: " + ", ".join(f"{name} {value:,.4g}" for name, value in result[group].items()))
    print("written to", write("cache", results, options))


if __name__ == "__main__":
    main()
