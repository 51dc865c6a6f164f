"""Run a module of the tests on two ranks with gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(module: str, *arguments: object, ranks: int = 2) -> None:
    """Run `python -m MODULE ARGUMENTS` with torchrun and require that all ranks succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]
    result = subprocess.run(
        [sys.executable, *launch, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=580,  # one core that others use takes ten times as long
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
