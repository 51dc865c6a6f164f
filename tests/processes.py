"""Run Python modules in new processes without importing torch and transformers for each of them.

The first call starts a server, which imports them once. Each process is forked from it, and has its own environment.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
_CONTEXT.set_forkserver_preload(["dwakd.training.run", "dwakd.answers.run", "transformers.models.llama.modeling_llama"])


def start(module: str, *arguments: object, log: Path, threads: int = 1, **environment: object) -> BaseProcess:
    """Start `python -m MODULE ARGUMENTS` with more variables in its environment, and write its output to a file."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    call = (module, [*map(str, arguments)], variables, threads, log)
    process = _CONTEXT.Process(target=_run, args=call)  # type: ignore[attr-defined]
    process.start()
    return process


def _run(module: str, arguments: list[str], environment: dict[str, str], threads: int, log: Path) -> None:
    os.environ |= environment
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    import torch

    torch.set_num_threads(threads)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
