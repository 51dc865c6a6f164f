"""Whether a compiled kernel runs here, found out when it is first wanted."""

import functools
import importlib
import logging

logger = logging.getLogger(__name__)


@functools.cache
def is_usable(module: str, needs: str, otherwise: str) -> bool:
    """Whether a kernel's module can be imported; if not, the reason is logged, once.

    Args:
        module: its whole name.
        needs: the package that it is compiled by.
        otherwise: what happens without it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        logger.warning("%s, because %s is not usable: %s", otherwise, needs, error)
        return False
    return True
