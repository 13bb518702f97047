"""The rule that decides if an engine that does not answer is working."""

from __future__ import annotations

#: An engine works if it uses at least this share of one CPU. A sleeping engine uses none, and
#: Podman's health check about 0.01, measured over five seconds. 0.05 is well above that, and low
#: enough for an engine that gets little time among many busy programs. The health check in the
#: container (units/healthcheck.py) computes its number of clock ticks from this share.
WORKING_SHARE = 0.05


def is_working(cpu_s: float, interval_s: float) -> bool:
    """Return True if a process that used ``cpu_s`` seconds of CPU time in an interval works."""
    return cpu_s >= WORKING_SHARE * interval_s
