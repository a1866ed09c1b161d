"""What a person can put right: told in one line, before any long work starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from sam_medical.common.signals import Stopped, stopping_at_signals

# What a command ends with when it was asked for something that cannot be done.
USER_ERROR_STATUS = 2


class UserError(Exception):
    """Names the file, key or value that is wrong, and says what to do about it."""


def first_line(error: BaseException) -> str:
    """What another library says went wrong, short enough for a message of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def in_one_line(text: str) -> str:
    """The text with line breaks and other control characters written out, as a name may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: OSError) -> str:
    """Which file, and what the system says of it."""
    reason = error.strerror or first_line(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Ends a command with one line and no traceback at a `UserError`, at an error of the system, and at a signal.

    The exit status is 2 after an error, and 128 more than the signal's number after a signal.
    """

    @wraps(main)
    def wrapped() -> None:
        try:
            with stopping_at_signals():
                main()
        except UserError as error:
            _end(str(error))
        except OSError as error:
            _end(describe(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not _is_of_memory(error):
                raise
            _end(f"the memory is not enough ({first_line(error)}); give a smaller batch_size or image_size.")
        except Stopped as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)

    return wrapped


def _is_of_memory(error: RuntimeError) -> bool:
    """As torch says it, of a GPU's memory or of the machine's."""
    return any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))


def _end(message: str) -> None:
    print(f"error: {in_one_line(message)}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
