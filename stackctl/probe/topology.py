"""Which CPUs share a core, a package, a die and an L3 cache, from /sys/devices/system/cpu."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from stackctl.probe.reading import Reader, tidy
from stackctl.values.cpulist import CpuList
from stackctl.values.host import L3

CPU = "/sys/devices/system/cpu"
_SIZE = re.compile(r"([0-9]{1,9})([KMG]?)")
#: POWER has eight threads a core; nothing has more. A longer list is damaged.
_MOST_SIBLINGS = 8
#: Names of the same set: since Linux 5.3, and before.
_CORE_FILES = ("core_cpus", "thread_siblings")
_GROUP_FILES = {"package": ("package_cpus", "core_siblings"), "die": ("die_cpus",)}
_GROUP_IDS = {"package": "physical_package_id", "die": "die_id"}

Cores = tuple[frozenset[int], ...]


def probe_cores(reader: Reader, online: list[int], *, by_number: bool = False) -> Cores | None:
    """Physical cores, from the sets of CPUs that share one.

    Core numbers would not do: they repeat over dies and sockets. With ``by_number`` they split
    such a set all the same: cores that share a floating-point unit are listed as siblings.
    """
    cores: list[frozenset[int]] = []
    covered: set[int] = set()
    everything = frozenset(online)
    for cpu in online:
        if cpu in covered:
            continue
        path, shared = _shared(reader, cpu, _CORE_FILES)
        if shared is None:
            return None
        core = shared & everything
        if cpu not in core or core & covered or len(core) > _MOST_SIBLINGS:
            reader.damaged(path, f"CPU {cpu} cannot share a core with '{CpuList(shared)}'")
            return None
        covered |= core
        numbers = (
            {other: reader.number(f"{CPU}/cpu{other}/topology/core_id") for other in sorted(core)}
            if by_number and len(core) > 1
            else {}
        )
        if None not in numbers.values() and len(set(numbers.values())) == len(core) > 1:
            cores += [frozenset([other]) for other in numbers]
        else:
            cores.append(core)
    return tuple(sorted(cores, key=min)) or None


def probe_groups(reader: Reader, online: list[int], kind: Literal["package", "die"]) -> int | None:
    """How many packages or dies there are; None when that is not said.

    Counted by their sets of CPUs: some machines number no package, or all alike.
    """
    groups: list[frozenset[int]] = []
    covered: set[int] = set()
    everything = frozenset(online)
    for cpu in online:
        if cpu in covered:
            continue
        _, shared = _shared(reader, cpu, _GROUP_FILES[kind])
        group = (shared or frozenset()) & everything
        if cpu not in group or group & covered:
            return _numbered_groups(reader, online, kind)
        covered |= group
        groups.append(group)
    if kind == "die" and groups and max(map(len, groups)) == 1 and len(groups) > 1:
        # What kernels say of processors without dies: each CPU its own.
        packages = probe_groups(reader, online, "package")
        return packages if packages == len(groups) else None
    return len(groups) or None


def _numbered_groups(
    reader: Reader, online: list[int], kind: Literal["package", "die"]
) -> int | None:
    numbers = set()
    for cpu in online:
        folder = f"{CPU}/cpu{cpu}/topology"
        package = reader.number(f"{folder}/physical_package_id")
        own = package if kind == "package" else reader.number(f"{folder}/{_GROUP_IDS[kind]}")
        if package is None or own is None:
            return None
        numbers.add((package, own))
    return len(numbers) or None


def _shared(reader: Reader, cpu: int, names: tuple[str, ...]) -> tuple[str, frozenset[int] | None]:
    """The first of these files that can be read, and its CPUs."""
    folder = f"{CPU}/cpu{cpu}/topology"
    path = f"{folder}/{names[0]}"
    for name in names:
        path = f"{folder}/{name}"
        # The list of package_cpus is package_cpus_list, and so on.
        shared = reader.cpus_either(f"{path}_list", path)
        if shared is not None:
            return f"{path}_list", shared
    return path, None


def cores_of_entries(
    entries: Mapping[int, Mapping[str, str]], online: frozenset[int]
) -> tuple[Cores | None, int | None]:
    """Cores and packages from /proc/cpuinfo, for containers that hide the topology."""
    cores: dict[tuple[str, str], set[int]] = {}
    packages: dict[str, set[str]] = {}
    counts: dict[str, str | None] = {}
    for cpu in sorted(online):
        entry = entries.get(cpu, {})
        package, core = entry.get("physical id"), entry.get("core id")
        if package is None or core is None:
            return None, None
        cores.setdefault((package, core), set()).add(cpu)
        packages.setdefault(package, set()).add(core)
        counts[package] = entry.get("cpu cores")
    # Some virtual machines number every core 0: only numbers that agree with the count are true.
    for package, numbers in packages.items():
        if counts[package] not in (None, str(len(numbers))):
            return None, None
    if any(len(core) > _MOST_SIBLINGS for core in cores.values()):
        return None, None
    ordered = sorted((frozenset(core) for core in cores.values()), key=min)
    return tuple(ordered), len(packages)


def probe_l3(reader: Reader, online: list[int], cores: Cores) -> tuple[L3, ...]:
    """The L3 caches, each with the CPUs that share it."""
    found: list[tuple[int | None, int | None, frozenset[int]]] = []
    everything = frozenset(online)
    covered: set[int] = set()
    for cpu in online:
        # One look a domain: hundreds of CPUs share few caches.
        folder = None if cpu in covered else _level3(reader, cpu)
        if folder is None:
            continue
        path = f"{folder}/shared_cpu_list"
        shared = reader.cpus_either(path, f"{folder}/shared_cpu_map")
        if shared is None:
            continue
        # Itanium says nothing here of a cache that one core has to itself.
        cpus = (shared or next((core for core in cores if cpu in core), shared)) & everything
        if cpu not in cpus or cpus & covered:
            reader.damaged(path, f"CPU {cpu} cannot share an L3 with '{CpuList(shared)}'")
            continue
        covered |= cpus
        found.append((reader.number(f"{folder}/id"), _size(reader, f"{folder}/size"), cpus))
    ids = [number for number, _, _ in found]
    # Older ARM kernels give no numbers: then it is the order, for all of them.
    numbered = None not in ids and len(set(ids)) == len(ids)
    return tuple(
        L3(id=number if numbered and number is not None else order, bytes=size,
           cpus=CpuList(cpus))
        for order, (number, size, cpus) in enumerate(found)
    )  # fmt: skip


def _level3(reader: Reader, cpu: int) -> str | None:
    folder = f"{CPU}/cpu{cpu}/cache"
    # Almost always index3; not with a single L1 cache or with more than three levels.
    if _digit(reader, f"{folder}/index3/level") == "3":
        return f"{folder}/index3"
    for path in reader.machine.glob(f"{folder}/index[0-9]*/level"):
        if _digit(reader, path) == "3":
            return path.removesuffix("/level")
    return None


def _digit(reader: Reader, path: str) -> str:
    return (reader.text(path) or "").strip("\0 \t\r\n")


def _size(reader: Reader, path: str) -> int | None:
    text = reader.text(path)
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip("\0 \t\r\n"))
    if match is None:
        reader.damaged(path, f"{tidy(text, most=40) or ''!r} is not a size")
        return None
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] or None
