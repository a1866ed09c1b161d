"""Ctrl-C, SIGTERM and SIGHUP: all three end a command in the same way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP, which a closed terminal sends, is not known on Windows.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A launcher passes on what its whole group got already: the same wish, told twice.
SECONDS_OF_ONE_WISH = 1.0
# Set in the environment of a process that is to end with the one that started it.
PARENT = "SSAM_ENDS_WITH_PARENT"


class Stopped(KeyboardInterrupt):
    """A signal has come, with this number; the message says where that leaves the command."""

    def __init__(self, number: int, message: str = "Stopped.") -> None:
        super().__init__(message)
        self.number = number


class Interruption:
    """While entered, takes note of a signal, so that the step at hand is finished and saved.

    A second Ctrl-C, well after the first signal, ends the program at once.

    Attributes:
        number: The first signal's; 0 if none has come.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __enter__(self) -> Interruption:
        self._handling = handling_signals(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handling.__exit__(None, None, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = int(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_WISH:
            raise Stopped(number)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While entered, the handler gets the signals that end a command, but for those that were ignored before.

    Whoever starts a command with nohup has SIGHUP ignored. Outside of the main thread nothing is changed.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """While entered, raises `Stopped` at each of the signals."""
    with handling_signals(_stop):
        yield


def end_with_parent() -> None:
    """If `PARENT` is set in the environment, ends this process as SIGTERM does once whoever started it is gone.

    The parent holds the other end of the pipe that this process reads, which the system closes however it ends.
    """
    if os.environ.pop(PARENT, None):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def ignore_signals() -> None:
    """For a process that works for another one, which tells it when to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
