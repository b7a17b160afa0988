"""Signals that end a command: all are answered like Ctrl-C."""
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Answer SIGTERM and SIGHUP like Ctrl-C, and pass them on to what this program runs.

    A cluster's scheduler sends the one; the other comes when the terminal is closed, except under nohup.
    """
    import psutil

    def press(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:  # nobody reads on: what is said from here on must not fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        for child in psutil.Process().children():
            with suppress(OSError, psutil.Error):
                if os.getpgid(child.pid) == os.getpgrp():  # not the servers, which have a group of their own
                    child.terminate()
        answer = signal.getsignal(signal.SIGINT)
        if not callable(answer):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        answer(signal.SIGINT, frame)

    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = [(one, signal.signal(one, press)) for one in heard]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)
