"""Run stackctl and kill it, or let its disk fail, at one place: for faults that need exact timing.

    python3 faults.py KIND PLACE LOG ARGUMENT...

KIND is kill (SIGKILL), or the name of an errno such as ENOSPC, with which every write to disk fails
from that place on. The places of a kill are before and after each write of the journal (two places
a step), those of an errno are the calls of fsync. LOG gets one line for each place that is reached.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

from stackctl.cli.main import run
from stackctl.state.generations import Journal
from stackctl.values.generation import Transaction


class Fault:
    """Counts the places, and starts the fault at one."""

    def __init__(self, kind: str, place: int, log: str) -> None:
        """Count PLACE from 1. With 0 the fault never starts."""
        self.kind, self.place, self.log = kind, place, log
        self.seen = 0

    def reach(self, what: str) -> bool:
        """Return True if the fault applies from here on."""
        self.seen += 1
        with Path(self.log).open("a", encoding="utf-8") as stream:
            stream.write(f"{self.seen} {what}\n")
        return bool(self.place) and self.seen >= self.place


def main() -> int:
    """Install the fault and run stackctl."""
    kind, place, log, *words = sys.argv[1:]
    fault = Fault(kind, int(place), log)
    if kind == "kill":
        write, clear = Journal.write, Journal.clear

        def killing(what: str) -> None:
            if fault.reach(what):
                os.kill(os.getpid(), signal.SIGKILL)

        def kill_write(self: Journal, transaction: Transaction) -> None:
            killing(f"before {transaction.step}")
            write(self, transaction)
            killing(f"after {transaction.step}")

        def kill_clear(self: Journal) -> None:
            killing("before the end")
            clear(self)
            killing("after the end")

        Journal.write = kill_write  # type: ignore[method-assign]
        Journal.clear = kill_clear  # type: ignore[method-assign]
    else:
        sync, number = os.fsync, getattr(errno, kind)

        def failing(descriptor: Any) -> None:
            if fault.reach("fsync"):
                raise OSError(number, os.strerror(number))
            sync(descriptor)

        os.fsync = failing  # type: ignore[assignment]
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
