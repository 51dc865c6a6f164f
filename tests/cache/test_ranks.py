"""Two processes build a cache together and train from it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.cache.builders import LONG, save_teacher, trainer
from tests.training.builders import assert_same, weights

ROOT = Path(__file__).parents[2]


def test_two_ranks_build_half_each(tmp_path):
    """A shard could be built twice or by no rank, or a rank could read before the other has written.

    With 13 rows the ranks have different numbers of rows in the last step.
    """
    teacher = save_teacher(tmp_path / "teacher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    result = subprocess.run(
        [sys.executable, *launch, "-m", "tests.cache.rank", str(teacher), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    built = [list(map(int, (tmp_path / f"rank-{rank}.txt").read_text().split())) for rank in (0, 1)]
    one = trainer(tmp_path / "one", teacher, cache=tmp_path / "alone", rows=LONG[:13])
    count = one.teachers[0].cache.num_shards
    assert built == [list(range(0, count, 2)), list(range(1, count, 2))]
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    one.train()
    assert_same(load_file(tmp_path / "weights.safetensors"), weights(one), atol=2e-4)
