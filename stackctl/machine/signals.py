"""Handle the signals that end a command, so that none interrupts a change halfway."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def handle_signals(
    handler: Callable[..., object] | signal.Handlers, numbers: Sequence[signal.Signals] = _ENDING
) -> Iterator[None]:
    """Handle signals while the block runs, by default SIGINT, SIGTERM and SIGHUP."""
    saved = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in saved.items():
            signal.signal(number, before)


def ignore_signals() -> contextlib.AbstractContextManager[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP while the block runs; those that arrive are lost."""
    return handle_signals(signal.SIG_IGN)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block has ended.

    Raises:
        KeyboardInterrupt: at the end, if one arrived.
    """
    heard: list[int] = []
    with handle_signals(lambda number, _: heard.append(number)):
        yield
    if heard:
        raise KeyboardInterrupt
