"""Unit files as text, before they are written to disk."""

from __future__ import annotations

from stackctl.values.base import Value


class UnitFile(Value, frozen=True, kw_only=True):
    """One file below the stack's unit folder: its bare name and its text."""

    name: str
    text: str


class UnitSet(Value, frozen=True, kw_only=True):
    """The units of one stack; ``service`` is the systemd service that Quadlet generates."""

    stack: str
    service: str
    container: str
    files: tuple[UnitFile, ...]
