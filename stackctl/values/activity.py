"""The one rule by which an engine that does not answer counts as working."""

from __future__ import annotations

#: The share of one CPU from which on an engine is at work. A sleeping engine uses none; Podman's
#: health check of it costs about a hundredth, measured over five seconds. A twentieth is well above
#: that, and low enough for an engine that gets little time among many busy programs. The health
#: check in the container (units/healthcheck.py) gets its number of clock ticks from here.
WORKING_SHARE = 0.05


def is_working(cpu_s: float, interval_s: float) -> bool:
    """Return True if a process that used ``cpu_s`` seconds of CPU time in an interval works."""
    return cpu_s >= WORKING_SHARE * interval_s
