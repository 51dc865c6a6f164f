"""The exception for errors that a user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error in a recipe, a file, a row or an option.

    The message is one sentence that names the place and the fix. The command line prints it without a traceback and
    exits with code 2; library code may catch it as a ValueError. Lone surrogates in the message are escaped, because pydantic
    and files cannot hold them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode(errors="backslashreplace").decode())


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any exception inside the block into a UserError that begins with `what`; UserErrors pass unchanged.

    Use it around other libraries, which raise exceptions of many unrelated types.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{what} ({type(error).__name__}: {reason:.200})") from error
