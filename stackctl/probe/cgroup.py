"""Control groups of this process: what they leave of the processors."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stackctl.probe.reading import Reader

ROOT = "/sys/fs/cgroup"
#: systemd nests units a few levels deep; the kernel's default limit is far above that.
_MOST_LEVELS = 64
_NUMBER = re.compile(r"-?[0-9]{1,18}")


def folders(reader: Reader, controller: str) -> tuple[tuple[int, str], ...]:
    """The version and folder of each cgroup of this process that may hold files of a controller,
    from its own up to the root."""
    found: list[tuple[int, str]] = []
    mounts = _mounts(reader)
    for line in (reader.text("/proc/self/cgroup") or "")[:65536].splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if hierarchy == "0" and not controllers:
            # With version 1 beside it, version 2 has a folder of its own.
            roots: Iterable[str] = (*mounts.get("2", ()), ROOT, f"{ROOT}/unified")
            found += [(2, folder) for root in dict.fromkeys(roots) for folder in _up(root, path)]
        elif controller in names:
            roots = (*mounts.get(controller, ()), f"{ROOT}/{controllers}", f"{ROOT}/{controller}")
            found += [(1, folder) for root in dict.fromkeys(roots) for folder in _up(root, path)]
    if controller == "cpuset":
        # Before there were control groups, cpusets had a file system of their own; and the file
        # of that time names the cgroup still, where a recording lacks the other.
        path = reader.line("/proc/self/cpuset") or ""
        roots = mounts.get("cpuset", ())
        found += [(1, folder) for root in roots for folder in _up(root, path)]
        roots = mounts.get("2", ())
        found += [(2, folder) for root in roots for folder in _up(root, path)]
    return tuple(dict.fromkeys(found))


def cpuset(reader: Reader) -> frozenset[int] | None:
    """The CPUs that the cpuset of this process leaves; None when there is none to be seen."""
    for version, folder in folders(reader, "cpuset"):
        # In version 1 what was set is what is in effect; in version 2 it may be out of reach.
        names = ("cpuset.cpus.effective",) if version == 2 else ()
        for name in (*names, "cpuset.cpus", "cpus"):
            cpus = reader.cpus(f"{folder}/{name}")
            # Empty means "as the parent".
            if cpus:
                return cpus
    return None


def quota(reader: Reader) -> float | None:
    """The CPU time that the tightest cgroup grants, in CPUs; None when none limits it."""
    found: list[float] = []
    for version, folder in folders(reader, "cpu"):
        if version == 2:
            words = (reader.text(f"{folder}/cpu.max") or "").split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [(reader.text(f"{folder}/{name}") or "").strip() for name in files]
        if len(words) == 2 and all(_NUMBER.fullmatch(word) for word in words):
            granted, period = map(int, words)
            # Version 1 says "no limit" with -1.
            if granted > 0 and period > 0:
                found.append(granted / period)
    return min(found, default=None)


def _up(root: str, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    if ".." in parts or len(parts) > _MOST_LEVELS:
        # Seen from inside a cgroup namespace, an outer cgroup starts with "..": not visible here.
        parts = []
    return ["/".join([root.rstrip("/"), *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def _mounts(reader: Reader) -> dict[str, list[str]]:
    """Where hierarchies are mounted: by controller, and "2" for version 2."""
    found: dict[str, list[str]] = {}
    for line in (reader.text("/proc/mounts") or "")[: 1 << 20].splitlines():
        words = line.split()
        if len(words) < 4 or len(found) > 64:
            continue
        _, place, kind, options = words[:4]
        if kind == "cgroup2":
            found.setdefault("2", []).append(place)
        elif kind == "cpuset":
            found.setdefault("cpuset", []).append(place)
        elif kind == "cgroup":
            for option in options.split(",")[:32]:
                found.setdefault(option, []).append(place)
    # A container may see the mounts of many others: the first of each is its own.
    return {name: places[:2] for name, places in found.items()}
