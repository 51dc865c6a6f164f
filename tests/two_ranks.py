"""Run a module of the tests on two ranks with gloo."""

import socket
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.processes import start


def run_on_two_ranks(module: str, *arguments: object, ranks: int = 2, use_cpu: str = "true") -> None:
    """Run `python -m MODULE ARGUMENTS` on each rank, as torchrun does, and require that all ranks succeed.

    `use_cpu` is the value of the variable with which accelerate chooses the CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(ranks)]
        processes = [
            start(module, *arguments, log=log, **group, RANK=rank, LOCAL_RANK=rank, ACCELERATE_USE_CPU=use_cpu)
            for rank, log in enumerate(logs)
        ]
        running = list(processes)
        while running and wait([process.sentinel for process in running], 580):  # minutes on a core that others use
            running = [process for process in running if process.is_alive()]
            if any(process.exitcode for process in processes):
                break  # the other ranks would wait for the one that failed
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * ranks, "\n".join(f"rank {log.stem}: {log.read_text()[-3000:]}" for log in logs)
