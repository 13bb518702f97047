"""CPUs that share a core, a package, a die or an L3 cache, and the kinds of cores, from /sys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import L3, CoreKind

CPU = "/sys/devices/system/cpu"
_SIZE = re.compile(r"([0-9]{1,9})([KMG]?)")
#: Cores have at most eight threads, on POWER. A longer list is damaged.
_MOST_SIBLINGS = 8
#: Names of the file with the same set: since Linux 5.3, and before.
_CORE_FILES = ("core_cpus", "thread_siblings")
_GROUP_FILES = {"package": ("package_cpus", "core_siblings"), "die": ("die_cpus",)}
_GROUP_IDS = {"package": "physical_package_id", "die": "die_id"}
#: Kinds, fastest first, with the device whose folder lists their CPUs on hybrid processors.
_KINDS = (("performance", "cpu_core"), ("efficient", "cpu_atom"), ("low-power", "cpu_lowpower"))
#: Cores whose clocks differ by more than this ratio are of two kinds. Favoured cores of one kind
#: ("turbo boost max", preferred cores) are some percent faster, cores under a stacked cache some
#: percent slower.
_CLOCK_RATIO = 1.2

Cores = tuple[frozenset[int], ...]


def probe_cores(reader: FactReader, online: list[int], *, by_number: bool = False) -> Cores | None:
    """Return the CPUs of each physical core, from the kernel's sets of siblings; None if unknown.

    Core numbers alone are not enough, because they repeat over dies and sockets. With
    ``by_number``, different numbers split a set: the kernel lists cores that share a floating-point
    unit as siblings.
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
            reader.note_damaged(path, f"CPU {cpu} cannot share a core with '{CpuList(shared)}'")
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


def probe_groups(
    reader: FactReader, online: list[int], kind: Literal["package", "die"]
) -> int | None:
    """Return the number of packages or dies; None if it is unknown.

    Their sets of CPUs are counted, because some machines give packages no number, or all the same.
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
        # For processors without dies, kernels show a die for each CPU.
        packages = probe_groups(reader, online, "package")
        return packages if packages == len(groups) else None
    return len(groups) or None


def _numbered_groups(
    reader: FactReader, online: list[int], kind: Literal["package", "die"]
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


def _shared(
    reader: FactReader, cpu: int, names: tuple[str, ...]
) -> tuple[str, frozenset[int] | None]:
    """Return the first of these files that can be read, and its CPUs; None if none can."""
    folder = f"{CPU}/cpu{cpu}/topology"
    path = f"{folder}/{names[0]}"
    for name in names:
        path = f"{folder}/{name}"
        # The list of package_cpus is package_cpus_list, and so on.
        shared = reader.cpus_from_mask_or_list(f"{path}_list", path)
        if shared is not None:
            return f"{path}_list", shared
    return path, None


def cores_of_entries(
    entries: Mapping[int, Mapping[str, str]], online: frozenset[int]
) -> tuple[Cores | None, int | None]:
    """Return cores and number of packages from /proc/cpuinfo; None if they are unknown.

    This is for containers that hide the topology in /sys.
    """
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
    # Some virtual machines number every core 0, so the numbers must agree with the count of cores.
    for package, numbers in packages.items():
        if counts[package] not in (None, str(len(numbers))):
            return None, None
    if any(len(core) > _MOST_SIBLINGS for core in cores.values()):
        return None, None
    ordered = sorted((frozenset(core) for core in cores.values()), key=min)
    return tuple(ordered), len(packages)


def probe_l3(reader: FactReader, online: list[int], cores: Cores) -> tuple[L3, ...]:
    """Return the L3 caches, each with the CPUs that share it."""
    found: list[tuple[int | None, int | None, frozenset[int]]] = []
    everything = frozenset(online)
    covered: set[int] = set()
    for cpu in online:
        # Each cache is read once: hundreds of CPUs share few caches.
        folder = None if cpu in covered else _level3(reader, cpu)
        if folder is None:
            continue
        path = f"{folder}/shared_cpu_list"
        shared = reader.cpus_from_mask_or_list(path, f"{folder}/shared_cpu_map")
        if shared is None:
            continue
        # On Itanium the list is empty if a core shares its cache with no other.
        cpus = (shared or next((core for core in cores if cpu in core), shared)) & everything
        if cpu not in cpus or cpus & covered:
            reader.note_damaged(path, f"CPU {cpu} cannot share an L3 with '{CpuList(shared)}'")
            continue
        covered |= cpus
        found.append((reader.number(f"{folder}/id"), _size(reader, f"{folder}/size"), cpus))
    ids = [number for number, _, _ in found]
    # Older ARM kernels give no numbers. Then all caches are numbered in their order.
    numbered = None not in ids and len(set(ids)) == len(ids)
    return tuple(
        L3(id=number if numbered and number is not None else order, bytes=size,
           cpus=CpuList(cpus))
        for order, (number, size, cpus) in enumerate(found)
    )  # fmt: skip


def _level3(reader: FactReader, cpu: int) -> str | None:
    folder = f"{CPU}/cpu{cpu}/cache"
    # It is almost always index3, except with a single L1 cache or more than three levels.
    if _digit(reader, f"{folder}/index3/level") == "3":
        return f"{folder}/index3"
    for path in reader.machine.glob(f"{folder}/index[0-9]*/level"):
        if _digit(reader, path) == "3":
            return path.removesuffix("/level")
    return None


def _digit(reader: FactReader, path: str) -> str:
    return (reader.text(path) or "").strip("\0 \t\r\n")


def _size(reader: FactReader, path: str) -> int | None:
    text = reader.text(path)
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip("\0 \t\r\n"))
    if match is None:
        reader.note_damaged(path, f"{sanitize(text, most=40) or ''!r} is not a size")
        return None
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] or None


def probe_core_types(reader: FactReader, online: frozenset[int]) -> tuple[CoreKind, ...]:
    """Return the kinds of cores, fastest first; empty if all are alike, or nothing shows the kinds.

    The sources are the lists of the drivers, then the relative capacities, then the clocks. Only
    the clocks show AMD's compact cores, ARM cores without capacities, and kinds before Linux 5.13.
    """
    lists = [
        (name, (reader.cpus(f"/sys/devices/{device}/cpus") or frozenset()) & online)
        for name, device in _KINDS
    ]
    capacities = _values(reader, online, "cpu_capacity")
    present = [(name, cpus) for name, cpus in lists if cpus]
    if len(present) > 1:
        return tuple(
            CoreKind(
                name=name,
                cpus=CpuList(cpus),
                capacity=max((capacities[cpu] for cpu in cpus if cpu in capacities), default=None),
            )
            for name, cpus in present
        )
    groups = [
        (capacity, frozenset(cpu for cpu, own in capacities.items() if own == capacity))
        for capacity in sorted(set(capacities.values()), reverse=True)
    ]
    if len(groups) > 1:
        names = ["big", *["middle"] * (len(groups) - 2), "little"]
        return tuple(
            CoreKind(name=name, cpus=CpuList(cpus), capacity=capacity)
            for name, (capacity, cpus) in zip(names, groups, strict=True)
        )
    classes = _by_clock(reader, online)
    if len(classes) < 2:
        return ()
    names = ["performance", "efficient", *["low-power"] * (len(classes) - 2)]
    return tuple(
        CoreKind(name=name, cpus=CpuList(cpus)) for name, cpus in zip(names, classes, strict=True)
    )


def _by_clock(reader: FactReader, online: frozenset[int]) -> list[set[int]]:
    """Return groups of CPUs by highest clock and base clock, fastest first; may be empty."""
    highest = _values(reader, online, "cpufreq/cpuinfo_max_freq")
    if len(set(highest.values())) < 2:
        return []
    base = _values(reader, online, "cpufreq/base_frequency")
    classes: list[set[int]] = []
    last: tuple[int, int] | None = None
    for cpu in sorted(highest, key=lambda cpu: (-highest[cpu], -base.get(cpu, 0), cpu)):
        here = highest[cpu], base.get(cpu, 0)
        # The same highest clock with another base clock is a setting of servers (SST), not another
        # kind of core.
        if last is None or (
            here[0] != last[0]
            and any(_far(one, other) for one, other in zip(here, last, strict=True))
        ):
            classes.append(set())
        classes[-1].add(cpu)
        last = here
    return classes


def _far(one: int, other: int) -> bool:
    return max(one, other) > _CLOCK_RATIO * min(one, other)


def _values(reader: FactReader, online: frozenset[int], name: str) -> dict[int, int]:
    """Return a number of every CPU; empty unless all of them have it."""
    found: dict[int, int] = {}
    for cpu in sorted(online):
        value = reader.number(f"{CPU}/cpu{cpu}/{name}")
        if value is None:
            # The files of the other CPUs, which may be hundreds, are not read in vain.
            return {}
        found[cpu] = value
    return found
