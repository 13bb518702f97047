"""Ignore or defer the signals that end a command, so that none interrupts a change halfway."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP while the block runs; those that arrive are lost."""
    saved = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block has ended.

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
