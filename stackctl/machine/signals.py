"""Signals that end a command, held off while a half-done change would be worse than none."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore Ctrl-C and the like, and forget those that arrive meanwhile."""
    saved = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Hold Ctrl-C and the like back until the end; child processes are not interrupted either.

    Raises:
        KeyboardInterrupt: at the end, if one arrived.
    """
    heard: list[int] = []
    saved = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
    if heard:
        raise KeyboardInterrupt
