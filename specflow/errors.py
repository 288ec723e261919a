"""The exceptions that end a command with one line: a user's mistake, and what a second try may mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend: the message is one line with what was got, what was expected and the fix.

    The command line prints it without a traceback and exits with code 2; anything else is a bug of ours.
    """


class RetryableError(UserError):
    """Nothing is wrong with the request: a server was lost, or somebody else had filled the GPU's memory.

    The command line exits with code 75 (EX_TEMPFAIL of sysexits.h), on which alone a flow tries the stage again.
    """

    EXIT_CODE = 75


@contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """Turn whatever a library raises about a user's file into one line: `what` failed, its own first words, the `cure`.

    For calls into libraries alone, one at a time. Their errors are of many classes: tokenizers raises bare Exception, a
    config whatever its arithmetic meets.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise UserError(f"{what} ({type(error).__name__}: {reason}): {cure}") from error
