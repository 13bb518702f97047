"""The only way to fail: an error with its cause, its place, a hint and an exit code."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence


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
        message: the fault and its place, in one line without a full stop.
        hint: the remedy; may hold several lines.
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


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint for an unknown word: the most similar known word, else ``otherwise``."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


class NotInstalled(StackctlError):
    """A required program or Python package is absent."""


class StartFailed(StackctlError):
    """A service is installed but does not come up; systemd restarts it as the unit defines.

    ``cause`` is the reason in the engine's log or its wrong answer, without the name of the stack.
    ``sets`` holds the KEY=VALUE of ``--set`` that the engine's log names as a remedy. ``kernel`` is
    set if other kernels of the same image may help.
    """

    cause: str | None = None
    sets: tuple[str, ...] = ()
    kernel: bool = False
