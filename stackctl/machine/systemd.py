"""systemctl and journalctl of one scope, one function per command, and the states of units."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner

Scope = Literal["user", "system"]
_NO_BUS = re.compile(
    r"Failed to connect to (bus|user scope bus|system scope bus)|not been booted with systemd",
    re.IGNORECASE,
)
#: The properties that ``parse_unit_state`` reads (org.freedesktop.systemd1(5)).
_PROPERTIES = (
    "ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "StartLimitBurst", "Job",
    "InvocationID", "MainPID", "CPUUsageNSec", "ActiveEnterTimestamp", "StateChangeTimestamp",
    "ActiveEnterTimestampMonotonic", "ExecMainStartTimestampMonotonic", "NeedDaemonReload",
    "DropInPaths",
)  # fmt: skip
#: This folder exists if systemd runs the machine (sd_booted(3)).
_BOOTED = Path("/run/systemd/system")


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


class Systemd:
    """The service manager of the system or of the calling user."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._flags = ("--user",) if scope == "user" else ()

    def _systemctl(
        self, *arguments: str, check: bool = True, timeout_s: float = 60
    ) -> runner.Completed:
        done = runner.run(
            ("systemctl", *self._flags, "--no-pager", *arguments), check=False, timeout_s=timeout_s
        )
        if done.status != 0 and _NO_BUS.search(done.stderr):
            raise self._unreachable(done.stderr)
        if check and done.status != 0:
            raise runner.process_error(done)
        return done

    def _unreachable(self, reason: str) -> StackctlError:
        if self.scope == "system" or not _BOOTED.is_dir():
            return StackctlError(
                "systemd is not running on this machine",
                hint="stackctl needs a machine booted with systemd; make demo brings its own",
                details=(reason.strip().splitlines()[0],),
                exit_code=ExitCode.HOST,
            )
        return StackctlError(
            "the service manager of this user cannot be reached",
            hint="log in as this user (ssh, not su), or: loginctl enable-linger USER; "
            "Debian also needs the package dbus-user-session",
            details=(reason.strip().splitlines()[0],),
            exit_code=ExitCode.HOST,
        )

    def require(self) -> None:
        """Raise StackctlError (exit 6) if this service manager cannot be reached."""
        self._systemctl("show", "--property=Version")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit. A missing unit has them, too (LoadState=not-found)."""
        return self.show_all((unit,), *properties)[unit]

    def show_all(self, units: Sequence[str], *properties: str) -> dict[str, dict[str, str]]:
        """Return properties of several units by the names given, with one call of systemctl."""
        if not units:
            return {}
        done = self._systemctl("show", *units, "--property=" + ",".join(properties))
        found: dict[str, dict[str, str]] = {}
        for unit, block in zip(units, done.stdout.split("\n\n"), strict=True):
            pairs = (line.partition("=") for line in block.splitlines())
            found[unit] = {name: value for name, equals, value in pairs if equals}
        return found

    def state(self, unit: str) -> UnitState:
        """Return the state of a unit; a unit that does not exist is inactive."""
        return self.states((unit,))[unit]

    def states(self, units: Sequence[str]) -> dict[str, UnitState]:
        """Return the states of several units by name, with one call of systemctl."""
        found = self.show_all(units, *_PROPERTIES)
        at_s = time.monotonic()
        return {name: parse_unit_state(properties, at_s) for name, properties in found.items()}

    def daemon_reload(self) -> None:
        """Read unit files again. systemd runs its generators for it, among them Quadlet."""
        self._systemctl("daemon-reload", timeout_s=120)

    def start(self, unit: str) -> None:
        """Queue a start and return without waiting; the caller follows the unit's state."""
        self._systemctl("start", "--no-block", unit)

    def run_transient(self, unit: str, description: str, argv: Sequence[str]) -> None:
        """Start a program as a service of its own, which systemd removes when the program ends."""
        runner.run(
            (
                "systemd-run", *self._flags, "--quiet", "--collect", "--no-ask-password",
                f"--unit={unit}", f"--description={description}", "--property=Type=exec",
                "--property=UMask=0022", "--", *argv,
            )
        )  # fmt: skip

    def restart(self, unit: str) -> None:
        """Queue a restart, or a start if the unit does not run, and return without waiting.

        It is one job of systemd, so it completes even if stackctl is killed.
        """
        self._systemctl("restart", "--no-block", unit)

    def stop(self, unit: str) -> None:
        """Stop a unit and wait for its end; a unit that does not exist counts as stopped."""
        done = self._systemctl("stop", unit, check=False, timeout_s=120)
        if done.status not in (0, 5):
            raise runner.process_error(done)

    def enable(self, unit: str) -> None:
        """Start a unit now and at every boot."""
        self._systemctl("enable", "--now", "--quiet", unit)

    def disable(self, unit: str) -> None:
        """Stop a unit and remove it from the boot; ignore a unit that does not exist."""
        self._systemctl("disable", "--now", "--quiet", unit, check=False)

    def abort(self, unit: str) -> None:
        """Kill the processes of a unit and stop it, to give up a start.

        During its start an engine may ignore SIGTERM, and systemd does not run ExecStop yet.
        """
        self.kill(unit)
        self.stop(unit)

    def kill(self, unit: str) -> None:
        """Kill all processes of a unit, which then fails; systemd may restart it (Restart=)."""
        self._systemctl("kill", "--signal=SIGKILL", unit, check=False)

    def reset_failed(self, unit: str) -> None:
        """Reset the failed state and the counted restarts; ignore a unit that has none."""
        self._systemctl("reset-failed", unit, check=False)

    def journal_command(
        self,
        units: Sequence[str],
        identifiers: Sequence[str],
        *,
        lines: int,
        since: float | None = None,
        follow: bool = False,
        output: str = "cat",
    ) -> tuple[str, ...]:
        """Return the journalctl command for the lines of these units under any of the identifiers.

        The identifiers leave out Podman's events and conmon's warnings. ``since`` is in seconds
        since the epoch.
        """
        select = "--user-unit" if self.scope == "user" else "--unit"
        return (
            "journalctl", "--no-pager", "--quiet", f"--output={output}",
            *(f"{select}={unit}" for unit in units),
            *(f"--identifier={identifier}" for identifier in identifiers), f"--lines={lines}",
            *((f"--since=@{since:.6f}",) if since is not None else ()),
            *(("--follow",) if follow else ()),
        )  # fmt: skip

    def journal(self, unit: str, identifier: str, *, since: float, lines: int = 200) -> list[str]:
        """Return the last lines under an identifier since a time, oldest first, no empty ones."""
        command = self.journal_command((unit,), (identifier,), lines=lines, since=since)
        done = runner.run(command, check=False)
        return [line for line in done.stdout.splitlines() if line.strip()]


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
