"""Settings of others in the places where ours go: found, so that none is overruled silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stackctl.provision import paths
from stackctl.provision.box import Box

_SYSCTL = re.compile(r"\s*-?\s*([\w./-]+)\s*=\s*(\S+)\s*$")
_DROP_IN = re.compile(r"\s*(LimitMEMLOCK|Delegate)\s*=\s*(.*?)\s*$")
_TMPFILES = re.compile(r"\s*[wf][+^!=~-]*\s+(\S+)(?:\s+\S+){4}\s+(\S.*?)\s*$")
_FOLDERS = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
#: Programs that set governors by files of their own.
_GOVERNORS = (
    "/etc/tuned/active_profile",
    "/etc/default/cpufrequtils",
    "/etc/default/cpupower",
    "/etc/systemd/system/graphical.target.wants/power-profiles-daemon.service",
)


@dataclass(frozen=True)
class Rival:
    """A line of somebody else's that sets what we would: ``key`` is sysctl's name, systemd's
    directive, or the file that systemd-tmpfiles writes."""

    path: str
    number: int
    key: str
    value: str

    @property
    def name(self) -> str:
        """What decides who comes last: the file's name, whatever its folder."""
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        """The line, as people write it."""
        return f"{self.path}:{self.number}" if self.number else self.path

    @property
    def local(self) -> bool:
        """Whether a person or a program of this machine wrote it, not the distribution."""
        return self.path.startswith(("/etc/", "/run/"))


def read(box: Box, *, user_id: int | None) -> tuple[Rival, ...]:
    """All of them, in no order."""
    units = ["user@.service.d", *([f"user@{user_id}.service.d"] if user_id is not None else [])]
    found: list[Rival] = []
    for folder in _FOLDERS:
        found += _lines(box, f"{folder}/sysctl.d/*.conf", _sysctl)
        found += _lines(box, f"{folder}/tmpfiles.d/*.conf", _tmpfiles)
        for unit in units:
            found += _lines(box, f"{folder}/systemd/system/{unit}/*.conf", _drop_in)
    found += _lines(box, "/etc/sysctl.conf", _sysctl)
    for path in _GOVERNORS:
        if box.there(path):
            found.append(Rival(path, 0, paths.GOVERNOR_SETTINGS, "a program of its own"))
    # Of two files of one name that in /etc counts (and /run's before /usr's).
    seen: dict[str, str] = {}
    for rival in found:
        seen.setdefault(rival.name, rival.path)
    return tuple(rival for rival in found if seen[rival.name] == rival.path)


def standing(
    found: Sequence[Rival], key: str, ours: str, accepted: Callable[[str], bool]
) -> tuple[Rival | None, bool]:
    """The line of others that counts for a key, and whether it stands as it is.

    It stands when its value will do, and when it is one that we must not overrule: a person's, or
    one that comes after our file. (None, False): the way is free.
    """
    mine = ours.rpartition("/")[2]
    last = max((rival for rival in found if rival.key == key), key=lambda r: r.name, default=None)
    if last is None:
        return None, False
    if accepted(last.value):
        return last, True
    return (last, False) if last.local or last.name > mine else (None, False)


def _lines(
    box: Box, pattern: str, parse: Callable[[str], tuple[str, str] | None]
) -> Iterator[Rival]:
    ours = set(paths.FILES.values())
    for path in box.machine.glob(pattern):
        if path in ours:
            continue
        for number, line in enumerate((box.read(path) or "").splitlines(), 1):
            found = None if line.lstrip().startswith(("#", ";")) else parse(line)
            if found is not None:
                yield Rival(path, number, *found)


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
    # Whatever pattern of CPUs it names.
    path = paths.GOVERNOR_SETTINGS if match[1].endswith("/scaling_governor") else match[1]
    return path, match[2]
