"""Compile CPU kernels with numba and run them on several threads."""

import functools
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
        message = "numba compiles %s again in each process, because it cannot write a cache: %s"
        logger.info(message, function.__name__, error)
        compiled = numba.njit(**options)(function)
    return compiled


def share(compute: Callable[[int, int], object], spans: list[tuple[int, int]], num_threads: int | None = None) -> None:
    """Call `compute` for all spans on several threads; by default as many threads as torch uses.

    The calling thread computes one span after the other, and helper threads take spans from the same list. A helper
    that has not started when the list is empty is cancelled, so a busy processor or a forked process without threads
    causes no delay. The helpers are Python threads, because the kernels release the GIL and numba's own thread pool
    would be a second OpenMP runtime beside torch's.
    """
    num_helpers = min(torch.get_num_threads() if num_threads is None else num_threads, len(spans)) - 1
    rest = iter(spans)

    def work() -> None:
        for first, last in rest:
            compute(first, last)

    helpers = [_pool(num_helpers).submit(work) for _ in range(num_helpers)]
    work()
    for helper in helpers:
        if not helper.cancel():  # it has started
            helper.result()


@functools.cache
def _pool(num_helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="kernel")
