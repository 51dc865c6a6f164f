"""Choose the implementation of a kernel by `impl=`, and load compiled ones on demand."""

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType

logger = logging.getLogger(__name__)

COMPILED_BY = {"cpu": "numba", "triton": "triton"}  # package, by implementation


def resolve(kernel: str, impl: str, unmet: Mapping[str, str | None], preferred: Sequence[str]) -> str:
    """Return the name of the implementation to run.

    Args:
        kernel: name of the kernel.
        impl: "auto", "naive" or a key of `unmet`. "auto" selects the first name in `preferred` that supports the input
            and can be imported, else "naive".
        unmet: the other implementations, by name: None if the input is supported, else what the implementation requires.
        preferred: names that "auto" tries in this order; a slow implementation is left out.

    Raises:
        ValueError: `impl` is unknown or does not support the input.
    """
    valid = ("auto", "naive", *unmet)
    if impl not in valid:
        raise ValueError(f"{kernel}: unknown impl {impl!r}; valid are {', '.join(map(repr, valid))}")
    if impl == "auto":
        return next((name for name in preferred if not unmet[name] and is_usable(kernel, name)), "naive")
    if unmet.get(impl):
        raise ValueError(f"{kernel}: impl {impl!r} requires {unmet[impl]}: use impl='auto'")
    return impl


@functools.cache
def is_usable(kernel: str, impl: str) -> bool:
    """Return whether an implementation can be imported; if not, log the reason once."""
    try:
        if impl in COMPILED_BY:
            module_of(kernel, impl)
    except ImportError as error:
        message = "%s runs in plain torch, several times slower, because %s cannot be imported: %s"
        logger.warning(message, kernel, COMPILED_BY[impl], error)
        return False
    return True


def module_of(kernel: str, impl: str) -> ModuleType:
    """Import the module of an implementation; this is done on demand, because loading numba takes half a second."""
    return importlib.import_module(f"dwakd.kernels.{kernel}.{impl}")
