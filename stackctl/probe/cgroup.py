"""The cgroups of this process, and their limits of CPUs and CPU time."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stackctl.probe.fact_reader import FactReader

ROOT = "/sys/fs/cgroup"
#: systemd nests units only a few levels deep.
_MOST_LEVELS = 64
_NUMBER = re.compile(r"-?[0-9]{1,18}")


def cgroup_folders(reader: FactReader, controller: str) -> tuple[tuple[int, str], ...]:
    """Return version and folder of each cgroup that may hold files of a controller.

    The order is from this process's own cgroup up to the root; folders need not exist.
    """
    found: list[tuple[int, str]] = []
    mounts = _mounts(reader)
    for line in (reader.text("/proc/self/cgroup") or "")[:65536].splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        if hierarchy == "0" and not controllers:
            # Beside version 1, version 2 is mounted in a folder of its own.
            roots: Iterable[str] = (*mounts.get("2", ()), ROOT, f"{ROOT}/unified")
            found += [(2, folder) for root in dict.fromkeys(roots) for folder in _up(root, path)]
        elif controller in names:
            roots = (*mounts.get(controller, ()), f"{ROOT}/{controllers}", f"{ROOT}/{controller}")
            found += [(1, folder) for root in dict.fromkeys(roots) for folder in _up(root, path)]
    if controller == "cpuset":
        # Before cgroups existed, cpusets had a file system of their own. The kernel still writes
        # the file of that time; it helps if a recording lacks /proc/self/cgroup.
        path = reader.line("/proc/self/cpuset") or ""
        roots = mounts.get("cpuset", ())
        found += [(1, folder) for root in roots for folder in _up(root, path)]
        roots = mounts.get("2", ())
        found += [(2, folder) for root in roots for folder in _up(root, path)]
    return tuple(dict.fromkeys(found))


def cpuset(reader: FactReader) -> frozenset[int] | None:
    """Return the CPUs that the cpuset of this process allows; None if no cpuset is visible."""
    for version, folder in cgroup_folders(reader, "cpuset"):
        # In version 2 a cpuset may list CPUs that its parent lacks; the effective ones count.
        names = ("cpuset.cpus.effective",) if version == 2 else ()
        for name in (*names, "cpuset.cpus", "cpus"):
            cpus = reader.cpus(f"{folder}/{name}")
            # An empty list means that the parent's CPUs apply.
            if cpus:
                return cpus
    return None


def cpu_quota(reader: FactReader) -> float | None:
    """Return the CPU time that the tightest cgroup grants, in CPUs; None without a limit."""
    found: list[float] = []
    for version, folder in cgroup_folders(reader, "cpu"):
        if version == 2:
            words = (reader.text(f"{folder}/cpu.max") or "").split()
        else:
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [(reader.text(f"{folder}/{name}") or "").strip() for name in files]
        if len(words) == 2 and all(_NUMBER.fullmatch(word) for word in words):
            granted, period = map(int, words)
            # In version 1 a quota of -1 means "no limit".
            if granted > 0 and period > 0:
                found.append(granted / period)
    return min(found, default=None)


def _up(root: str, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    if ".." in parts or len(parts) > _MOST_LEVELS:
        # In a cgroup namespace the path of an outer cgroup begins with "..", and its folder is not
        # visible.
        parts = []
    return ["/".join([root.rstrip("/"), *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def _mounts(reader: FactReader) -> dict[str, list[str]]:
    """Return the mount points of the hierarchies by controller; the key of version 2 is "2"."""
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
    # A container may see the mounts of many other containers, after its own.
    return {name: places[:2] for name, places in found.items()}
