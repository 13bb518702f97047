"""The front door of a stack: HAProxy on the stable port, before the engine's private one."""

from __future__ import annotations

from stackctl.values.base import Value


class Door(Value, frozen=True, kw_only=True):
    """What a front door is made of.

    ``port`` and ``address`` are what clients use, ``engine_port`` is the engine's on 127.0.0.1;
    ``hold_s`` is how long a request waits for an engine. ``image`` is a pinned reference, and
    ``program`` what must be started in it (empty: its entry point). ``key``: clients need a key.
    """

    port: int
    address: str = "127.0.0.1"
    engine_port: int
    health_path: str
    hold_s: int = 120
    image: str
    program: tuple[str, ...] = ()
    key: bool = False
