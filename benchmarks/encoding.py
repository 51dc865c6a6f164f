"""Measure the memory and the time of encoding many short rows, and of a second start that reads the stored rows.

    python benchmarks/encoding.py --rows 1000000

The rows, the tokenizers and the file of encoded rows are made in a temporary folder. Each start is a separate process, which
prints the seconds of `encode_source` and the largest memory of the process beyond that of its imports.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "red",
    "green",
    "and",
    "blue",
    "birds",
]


def write_rows(path: Path, count: int) -> None:
    """Write rows with a prompt of about 8 and a response of about 16 words."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            words = generator.choices(WORDS, k=generator.randint(12, 36))
            row = {
                "prompt": f"{number}: {' '.join(words[: len(words) // 3])}?",
                "response": " ".join(words[len(words) // 3 :]),
            }
            file.write(json.dumps(row) + "\n")


def start(rows: Path) -> None:
    """Encode the rows for a student and a teacher, and print what it costs."""
    from tests.builders import bpe_byte_fallback, byte_bpe

    from dwakd.data.encoding import TextEncoder
    from dwakd.recipe.training import DistillConfig
    from dwakd.training.inputs import encode_source

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    encoders = TextEncoder(byte_bpe(WORDS), "plain"), TextEncoder(bpe_byte_fallback(WORDS), "plain")
    args = DistillConfig(output_dir=str(rows.parent), use_cpu=True, template="plain")
    before, started = memory(), time.perf_counter()
    pairs = encode_source(rows, encoders, args, "train")[1]
    seconds = time.perf_counter() - started
    assert pairs is not None
    items = [pairs[random.Random(1).randrange(len(pairs))] for _ in range(1000)]
    tokens = sum(pairs.student_lengths)
    print(
        f"{len(pairs):,} rows with {tokens:,} tokens of the student: {seconds:.1f} s, {memory() - before:.2f} GiB "
        f"({memory():.2f} GiB with imports), {len(items):,} rows read"
    )


def main() -> None:
    """Run both starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        start(options.start)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, options.rows)
        for name in ("first start", "second start"):
            print(name, end=": ", flush=True)
            command = [sys.executable, __file__, "--start", str(rows)]
            subprocess.run(command, check=True, env={**os.environ, "HF_DATASETS_CACHE": str(Path(folder) / "cache")})


if __name__ == "__main__":
    main()
