"""Find foreign settings where stackctl's files would go, so that none is overruled silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from stackctl.provision.box import Box
from stackctl.requirements import paths
from stackctl.requirements.facts import ForeignSetting

_SYSCTL = re.compile(r"\s*-?\s*([\w./-]+)\s*=\s*(\S+)\s*$")
_DROP_IN = re.compile(r"\s*(LimitMEMLOCK|Delegate)\s*=\s*(.*?)\s*$")
_TMPFILES = re.compile(r"\s*[wf][+^!=~-]*\s+(\S+)(?:\s+\S+){4}\s+(\S.*?)\s*$")
_FOLDERS = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
#: Files that show that another program sets the governors.
_GOVERNORS = (
    "/etc/tuned/active_profile",
    "/etc/default/cpufrequtils",
    "/etc/default/cpupower",
    "/etc/systemd/system/graphical.target.wants/power-profiles-daemon.service",
)


def read(box: Box, *, user_id: int | None) -> tuple[ForeignSetting, ...]:
    """Return the foreign settings, in no order.

    ``user_id`` is the service user, whose own service manager may have drop-ins; None without one.
    """
    units = ["user@.service.d", *([f"user@{user_id}.service.d"] if user_id is not None else [])]
    found: list[ForeignSetting] = []
    for folder in _FOLDERS:
        found += _lines(box, f"{folder}/sysctl.d/*.conf", _sysctl)
        found += _lines(box, f"{folder}/tmpfiles.d/*.conf", _tmpfiles)
        for unit in units:
            found += _lines(box, f"{folder}/systemd/system/{unit}/*.conf", _drop_in)
    found += _lines(box, "/etc/sysctl.conf", _sysctl)
    for path in _GOVERNORS:
        if box.there(path):
            found.append(ForeignSetting(path, 0, paths.GOVERNOR_SETTINGS, "a program of its own"))
    # Of files of one name only the first counts, in the order of _FOLDERS (systemd, tmpfiles.d(5)).
    seen: dict[str, str] = {}
    for line in found:
        seen.setdefault(line.name, line.path)
    return tuple(line for line in found if seen[line.name] == line.path)


def _lines(
    box: Box, pattern: str, parse: Callable[[str], tuple[str, str] | None]
) -> Iterator[ForeignSetting]:
    ours = set(paths.FILES.values())
    for path in box.machine.glob(pattern):
        if path in ours:
            continue
        for number, line in enumerate((box.read(path) or "").splitlines(), 1):
            found = None if line.lstrip().startswith(("#", ";")) else parse(line)
            if found is not None:
                yield ForeignSetting(path, number, *found)


def _sysctl(line: str) -> tuple[str, str] | None:
    match = _SYSCTL.match(line)
    return (match[1].replace("/", "."), match[2]) if match else None


def _drop_in(line: str) -> tuple[str, str] | None:
    match = _DROP_IN.match(line)
    return (match[1], match[2]) if match else None


def _tmpfiles(line: str) -> tuple[str, str] | None:
    match = _TMPFILES.match(line)
    if match is None:
        return None
    # Any pattern of CPUs counts as all CPUs.
    path = paths.GOVERNOR_SETTINGS if match[1].endswith("/scaling_governor") else match[1]
    return path, match[2]
