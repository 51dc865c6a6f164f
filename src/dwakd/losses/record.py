"""Record what a loss computes on the way (alignment, band, costs, token weights), for `dwakd inspect`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Recorded = dict[str, list[Any]]
_recorded: ContextVar[Recorded | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[Recorded]:
    """Collect what losses pass to `record` inside a `with` block: by name, a list in the order of the calls."""
    found: Recorded = {}
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Return whether the caller is inside `recording`."""
    return _recorded.get() is not None


def record(**values: Any) -> None:
    """Keep values by their names if the caller is inside `recording`. Otherwise do nothing."""
    if (found := _recorded.get()) is not None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)
