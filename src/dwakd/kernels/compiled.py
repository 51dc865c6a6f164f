"""Compile CPU kernels with numba and run them on several threads."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

logger = logging.getLogger(__name__)


def compiled_by_numba(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function with numba.njit; cache the result on disk if a cache folder is writable."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba: "no locator available"
        logger.info("each process compiles %s again, as numba cannot write a cache: %s", function.__name__, error)
        compiled = numba.njit(**options)(function)
    return compiled


def share(compute: Callable[[int, int], object], spans: list[tuple[int, int]], num_threads: int | None = None) -> None:
    """Call `compute` for all spans on several threads; by default as many threads as torch uses.

    The calling thread and its helpers take spans from the same list. The helpers are new Python threads in each call:
    the kernels release the GIL, numba's own threads would be a second OpenMP runtime beside torch's, and threads that
    are kept do not exist in forked processes.
    """
    num_helpers = min(torch.get_num_threads() if num_threads is None else num_threads, len(spans)) - 1
    rest = iter(spans)

    def work() -> None:
        for first, last in rest:
            compute(first, last)

    with ThreadPoolExecutor(max(num_helpers, 1)) as pool:  # starts no thread before the first submission
        helpers = [pool.submit(work) for _ in range(num_helpers)]
        work()
    for helper in helpers:
        helper.result()
