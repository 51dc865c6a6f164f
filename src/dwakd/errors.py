"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in a recipe, a file, a row or an option.

    The message is one sentence that names the place and the mend. The command line prints it without a
    traceback and exits with code 2; library code may catch it as a ValueError.
    """
