"""Errors that the user can fix. Commands report them in one line, before any long work starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from io import TextIOWrapper

from sam_medical.common.signals import Stopped, stopping_at_signals

# The exit status of a command after an error.
USER_ERROR_STATUS = 2


class UserError(Exception):
    """An error of the user's input. Its message names the wrong file, key or value, and the remedy."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def in_one_line(text: str) -> str:
    """Escapes line breaks and other control characters, which file names may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: OSError) -> str:
    """Returns the file name and the system's reason."""
    reason = error.strerror or first_line(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a command: user errors, system errors and signals end it with one line instead of a traceback.

    The exit status is 2 after an error, and 128 plus the signal number after a signal.
    """

    @wraps(main)
    def wrapped() -> None:
        _print_any_text()
        try:
            with stopping_at_signals():
                main()
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(USER_ERROR_STATUS)
        except UserError as error:
            _end(str(error))
        except OSError as error:
            _end(describe(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not _is_of_memory(error):
                raise
            _end(f"out of memory ({first_line(error)}); give a smaller batch_size or image_size.")
        except Stopped as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.number)

    return wrapped


def _print_any_text() -> None:
    """Escapes characters that the terminal's encoding lacks: labels may be in any language."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_of_memory(error: RuntimeError) -> bool:
    """Whether torch's message is about a lack of GPU or host memory."""
    return any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))


def _end(message: str) -> None:
    print(f"error: {in_one_line(message)}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
