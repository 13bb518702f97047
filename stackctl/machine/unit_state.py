"""The state of a unit as a typed value, from the properties that systemctl prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The properties that ``parse_unit_state`` reads (org.freedesktop.systemd1(5)).
PROPERTIES = (
    "ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "StartLimitBurst", "Job",
    "InvocationID", "MainPID", "CPUUsageNSec", "ActiveEnterTimestamp", "StateChangeTimestamp",
    "ActiveEnterTimestampMonotonic", "ExecMainStartTimestampMonotonic", "NeedDaemonReload",
    "DropInPaths",
)  # fmt: skip


@dataclass(frozen=True)
class UnitState:
    """The state of a unit at one moment. None is unknown, or a property that the unit lacks.

    ``at_s`` is the time of the reading. ``active``, ``sub`` and ``result`` are systemd's
    ActiveState, SubState and Result; ``exit_status`` is that of the main process. ``restarts``
    counts automatic restarts since the last start by hand; systemd gives up after
    ``start_limit_burst`` starts. ``cpu_s`` is the CPU time of the unit so far. ``since`` is the
    beginning of the current state, as systemd prints it. ``active_since_s`` is the time at which
    the unit became active, ``main_started_s`` the start of its main process (0: never). Both are
    seconds on the monotonic clock, and so is ``at_s``. ``has_job`` is True if systemd has a job
    queued for the unit.
    """

    at_s: float
    active: str | None = None
    sub: str | None = None
    result: str | None = None
    exit_status: int | None = None
    restarts: int | None = None
    start_limit_burst: int | None = None
    has_job: bool = False
    invocation: str | None = None
    main_pid: int | None = None
    cpu_s: float | None = None
    since: str | None = None
    active_since_s: float | None = None
    main_started_s: float = 0.0
    needs_reload: bool = False
    drop_ins: tuple[str, ...] = ()

    @property
    def is_active(self) -> bool:
        """Return True if the unit runs and, with Type=notify, has reported that it is ready."""
        return self.active == "active"

    @property
    def running_s(self) -> float | None:
        """Return the seconds since the unit became active, at the reading; None if it never did."""
        return None if self.active_since_s is None else self.at_s - self.active_since_s

    @property
    def gave_up_after(self) -> int | None:
        """Return the number of starts after which systemd gave up, or None if it did not.

        ``result`` may keep the reason of the first failure, so restarts are counted as well.
        """
        if self.result == "start-limit-hit":
            return self.start_limit_burst
        burst, restarts = self.start_limit_burst, self.restarts
        return burst if burst and restarts is not None and burst <= restarts else None

    @property
    def has_failed(self) -> bool:
        """Return True if the requested start has failed.

        An automatic restart counts as a failure, so that the user sees it at once.
        """
        if self.active == "failed" or self.sub == "auto-restart" or self.restarts:
            return True
        if self.active == "inactive" and not self.has_job:
            return True
        return (self.result or "success") != "success"


def parse_unit_state(properties: Mapping[str, str], at_s: float) -> UnitState:
    """Return the state from properties of ``systemctl show``, called at the time ``at_s``."""

    def whole(name: str) -> int | None:
        # systemctl prints "[not set]" for some numbers that are unset.
        text = properties.get(name, "")
        return int(text) if text.isdecimal() else None

    active, cpu_ns = properties.get("ActiveState"), whole("CPUUsageNSec")
    entered_us = whole("ActiveEnterTimestampMonotonic")
    since = "ActiveEnterTimestamp" if active == "active" else "StateChangeTimestamp"
    return UnitState(
        at_s=at_s,
        active=active,
        sub=properties.get("SubState"),
        result=properties.get("Result"),
        exit_status=whole("ExecMainStatus"),
        restarts=whole("NRestarts"),
        start_limit_burst=whole("StartLimitBurst"),
        has_job=properties.get("Job", "0") not in ("0", ""),
        invocation=properties.get("InvocationID"),
        main_pid=whole("MainPID") or None,
        cpu_s=None if cpu_ns is None else cpu_ns / 1e9,
        since=properties.get(since) or None,
        active_since_s=entered_us / 1e6 if entered_us else None,
        main_started_s=(whole("ExecMainStartTimestampMonotonic") or 0) / 1e6,
        needs_reload=properties.get("NeedDaemonReload") == "yes",
        drop_ins=tuple(properties.get("DropInPaths", "").split()),
    )
