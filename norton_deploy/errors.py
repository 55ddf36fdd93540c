"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, layer or field, says what was expected and what to do.
    Commands print it without a traceback and exit with status 1.
    """
