"""A change of what runs while it goes on: the document ``stackctl.transaction/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class Transaction(Value, frozen=True, kw_only=True):
    """What is being changed, kept on disk until it is over.

    ``before`` is the generation that was installed (None: none) and ``running`` whether it ran;
    ``after`` the one that shall be (None: none, a ``down``). Who finds this after a crash makes
    the machine be ``after`` when ``committed``, else ``before``. ``step`` is the step that was
    begun last.
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
        """The generation that shall be in the end; None when none shall."""
        return self.after if self.committed else self.before
