"""Work beside the rest of the probe, because its answer may take seconds or never come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from stackctl.errors import StackctlError

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that works for at most ``patience_s`` seconds; it does not keep stackctl alive."""

    def __init__(self, work: Callable[[], T], patience_s: float) -> None:
        self._work = work
        self._give_up = time.monotonic() + patience_s
        self._result: T | None = None
        self._error: StackctlError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except StackctlError as error:
            self._error = error

    def result(self) -> T | None:
        """Wait for the result and return it; None if the time ran out.

        Raises:
            StackctlError: the error of the work.
        """
        self._thread.join(max(0.0, self._give_up - time.monotonic()))
        if self._error is not None:
            raise self._error
        return self._result
