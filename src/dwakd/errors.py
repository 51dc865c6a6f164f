"""The exception for errors that a user can fix."""


class UserError(ValueError):
    """An error in a recipe, a file, a row or an option.

    The message is one sentence that names the place and the fix. The command line prints it without a traceback and
    exits with code 2; library code may catch it as a ValueError.
    """


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class, for use in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
