"""The record of a running change: the document ``stackctl.transaction/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class Transaction(Value, frozen=True, kw_only=True):
    """A change that is under way. Its file stays on disk until the change has ended.

    ``before`` is the installed generation (None: there was none), ``running`` is True if it ran.
    ``after`` is the generation to install (None: none, the change is a ``down``). After a crash the
    next stackctl converges to ``after`` if ``committed`` is set, else to ``before``. ``step`` is
    the step that was begun last.
    """

    schema: Literal["stackctl.transaction/1"] = "stackctl.transaction/1"
    operation: Literal["up", "switch", "rollback", "restart", "down"]
    stack: str
    before: int | None = None
    running: bool = False
    after: int | None = None
    committed: bool = False
    step: str
    started: str

    @property
    def winner(self) -> int | None:
        """Return the generation to converge to after a crash; None: nothing shall be installed."""
        return self.after if self.committed else self.before
