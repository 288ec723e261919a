"""The exceptions that end a command with one line: a user's mistake, and what a second try may mend."""


class UserError(ValueError):
    """Something the user can mend: the message is one line with what was got, what was expected and the fix.

    The command line prints it without a traceback and exits with code 2; anything else is a bug of ours.
    """


class RetryableError(UserError):
    """Nothing is wrong with the request: a server was lost, or somebody else had filled the GPU's memory.

    The command line exits with code 75 (EX_TEMPFAIL of sysexits.h), on which alone a flow tries the stage again.
    """

    EXIT_CODE = 75
