"""Containers that outlive their unit."""

from __future__ import annotations

from stackctl.machine import runner


def remove(container: str) -> None:
    """Remove a container, if there is one, whatever state it is in.

    Where systemd has killed its monitor, Podman finds out only by failing ("conmon exited
    prematurely"), and succeeds the next time.
    """
    words = ("podman", "rm", "--force", "--ignore", "--time=5", container)
    if runner.run(words, check=False).status != 0:
        runner.run(words)
