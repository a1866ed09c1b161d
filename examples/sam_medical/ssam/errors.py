"""What a person can put right: told in one line, before any long work starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps


class UserError(Exception):
    """Names the file, key or value that is wrong, and says what to do about it."""


def first_line(error: Exception) -> str:
    """What another library says went wrong, short enough for a message of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a command with the message alone, and no traceback, when it raises a `UserError` or at Ctrl-C."""

    @wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            sys.exit(130)

    return wrapped
