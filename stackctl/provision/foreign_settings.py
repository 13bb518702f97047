"""Find foreign settings where stackctl's files would go, so that none is overruled silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from stackctl.provision.target_root import TargetRoot
from stackctl.requirements import host_paths
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


def find_foreign_settings(target: TargetRoot, *, user_id: int | None) -> tuple[ForeignSetting, ...]:
    """Return the foreign settings, in no order.

    ``user_id`` is the service user, whose own service manager may have drop-ins; None without one.
    """
    units = ["user@.service.d", *([f"user@{user_id}.service.d"] if user_id is not None else [])]
    kinds = (
        ("sysctl.d", _sysctl),
        ("tmpfiles.d", _tmpfiles),
        *((f"systemd/system/{unit}", _drop_in) for unit in units),
    )
    found: list[ForeignSetting] = []
    for below, parse in kinds:
        # Of files of one name only the first counts, in the order of _FOLDERS, even if it is empty:
        # that is how an administrator masks a file (sysctl.d(5), tmpfiles.d(5), systemd.unit(5)).
        first: dict[str, str] = {}
        for folder in _FOLDERS:
            for path in target.machine.glob(f"{folder}/{below}/*.conf"):
                first.setdefault(path.rpartition("/")[2], path)
        for path in first.values():
            found += _lines(target, path, parse)
    found += _lines(target, "/etc/sysctl.conf", _sysctl)
    for path in _GOVERNORS:
        if target.exists(path):
            found.append(
                ForeignSetting(path, 0, host_paths.GOVERNOR_SETTINGS, "a program of its own")
            )
    return tuple(found)


def _lines(
    target: TargetRoot, path: str, parse: Callable[[str], tuple[str, str] | None]
) -> Iterator[ForeignSetting]:
    if path in host_paths.FILES.values():
        return
    for number, line in enumerate((target.read(path) or "").splitlines(), 1):
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
    path = host_paths.GOVERNOR_SETTINGS if match[1].endswith("/scaling_governor") else match[1]
    return path, match[2]
