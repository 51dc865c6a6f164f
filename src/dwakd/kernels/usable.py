"""Find out whether a compiled kernel can run on this machine."""

import functools
import importlib
import logging

logger = logging.getLogger(__name__)


@functools.cache
def is_usable(module: str, needs: str, otherwise: str) -> bool:
    """Return whether a kernel's module can be imported; if not, log the reason once.

    Args:
        module: full name of the module.
        needs: the package that compiles the kernel.
        otherwise: what happens without the kernel; the warning begins with it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        logger.warning("%s, because %s cannot be imported: %s", otherwise, needs, error)
        return False
    return True
