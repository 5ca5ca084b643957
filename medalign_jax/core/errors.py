"""The one base of every error that a user can mend."""


class UserError(ValueError):
    """Something outside the code is wrong: a file, a row, a flag, a weight.

    The message says what is wrong, where (row, path, tensor name), and what to do about it.
    Command-line entry points print it without a stack trace and exit with status 1.
    """
