"""The one way to fail: an error that says what, where and how to fix it."""

from __future__ import annotations

import enum
from collections.abc import Sequence


class ExitCode(enum.IntEnum):
    """Exit codes of the command line; documented in the README and never renumbered."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    NOT_FOUND = 4
    REFUSED = 5
    HOST = 6
    LOCKED = 7
    INTERRUPTED = 130


class StackctlError(Exception):
    """An expected failure, shown to the user as ``error:``, details and ``hint:``.

    Args:
        message: what went wrong and where, in one line without a full stop.
        hint: what to do about it; may hold several lines.
        details: evidence, one line each (log lines, reasons).
        exit_code: one of ExitCode.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        details: Sequence[str] = (),
        exit_code: ExitCode = ExitCode.FAILED,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.exit_code = exit_code


class NotInstalled(StackctlError):
    """A program or a Python package that is needed is absent."""


class DidNotStart(StackctlError):
    """All is in place, but a service does not come up; systemd goes on with it as the unit says.

    ``cause`` is the reason that the engine's log names, without the name of the stack. ``sets`` are
    the KEY=VALUE of ``--set`` that would help, where the engine itself named them. ``kernel`` is
    set where other kernels of the same image may do better.
    """

    cause: str | None = None
    sets: tuple[str, ...] = ()
    kernel: bool = False
