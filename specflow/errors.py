"""The one exception that a user's mistake ends in."""


class UserError(ValueError):
    """Something the user can mend: the message is one line with what was got, what was expected and the fix.

    The command line prints it without a traceback and exits with code 2; anything else is a bug of ours.
    """
