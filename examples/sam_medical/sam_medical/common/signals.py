"""Handling of Ctrl-C, SIGTERM and SIGHUP. All three end a command in the same way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# A closed terminal sends SIGHUP, which Windows does not have.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A launcher forwards signals that its process group has received already. Within this time, both are one request.
SECONDS_OF_ONE_REQUEST = 1.0
# Environment variable of processes that must end together with their parent.
PARENT = "SSAM_ENDS_WITH_PARENT"


class Stopped(KeyboardInterrupt):
    """Raised at a signal. The message tells the user how to continue."""

    def __init__(self, number: int, message: str = "Stopped.") -> None:
        super().__init__(message)
        self.number = number


class Interruption:
    """A context manager that records signals, so the current step can be finished and saved.

    A second Ctrl-C, more than `SECONDS_OF_ONE_REQUEST` after the first signal, ends the program at once.

    Attributes:
        number: The number of the first signal; 0 if none was received.
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
        elif number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            raise Stopped(number)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs a handler for the signals that end a command, except for ignored ones, for the duration of the block.

    nohup, for example, ignores SIGHUP. In other threads than the main one, nothing is changed.
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
    """Raises `Stopped` at each of these signals inside the block."""
    with handling_signals(_stop):
        yield


def end_with_parent() -> None:
    """Sends SIGTERM to this process when its parent ends, if `PARENT` is set in the environment.

    Standard input is a pipe from the parent. The system closes it when the parent ends for any reason.
    """
    if os.environ.pop(PARENT, None):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def ignore_signals() -> None:
    """Ignores the signals in a worker process, which its parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
