"""What compiled kernels on the CPU share: how numba compiles them, and threads."""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

logger = logging.getLogger(__name__)


def compiled_by_numba(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit with an on-disk cache where a folder for it is writable, and without one elsewhere."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba: "no locator available"
        logger.info("%s is compiled anew in each process: %s.", function.__name__, error)
        compiled = numba.njit(**options)(function)
    return compiled


def share(compute: Callable[[int, int], object], spans: list[tuple[int, int]], num_threads: int | None = None) -> None:
    """Compute all the spans, with helpers as far as they come to run; as many threads as torch has if not given.

    This thread takes one span after the other; others help. None of them is waited for before it has begun, so that a
    busy processor, or a forked process without them, costs no time. They are plain threads, for kernels that release
    the GIL: numba's own pool would be a second OpenMP runtime beside torch's.
    """
    num_helpers = min(torch.get_num_threads() if num_threads is None else num_threads, len(spans)) - 1
    rest = iter(spans)

    def work() -> None:
        for first, last in rest:
            compute(first, last)

    helpers = [_pool(num_helpers).submit(work) for _ in range(num_helpers)]
    work()
    for helper in helpers:
        if not helper.cancel():  # it has begun
            helper.result()


@functools.cache
def _pool(num_helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_helpers, thread_name_prefix="kernel")
