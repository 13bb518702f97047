"""Processor topology from /sys/devices/system/cpu, /sys/devices/system/node and /proc/cpuinfo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stackctl.errors import StackctlError
from stackctl.probe.reading import Reader, cpu_set, tidy
from stackctl.values.cpulist import format_cpulist
from stackctl.values.host import L3, Cpu, NumaNode, Problem

_CPU = "/sys/devices/system/cpu"
_NODE = "/sys/devices/system/node"

#: What inference kernels are chosen by, weakest first, in the kernel's names.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

#: POWER has eight threads a core; nothing has more. A longer list is damaged.
_MOST_SIBLINGS = 8

#: "CPU implementer" of the makers of ARM servers.
_IMPLEMENTERS = {"0x41": "ARM", "0x48": "HiSilicon", "0x4e": "NVIDIA", "0x61": "Apple",
                 "0xc0": "Ampere"}  # fmt: skip

_SIZE = re.compile(r"([0-9]{1,9})([KMG]?)")
_MEM_TOTAL = re.compile(r"^Node\s+[0-9]+\s+MemTotal:\s+([0-9]{1,14})\s+kB\s*$", re.MULTILINE)
_ALLOWED = re.compile(r"^Cpus_allowed_list:[ \t]*(.*)$", re.MULTILINE)

Cores = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says: of the first processor, and of each for the fallback."""

    model: str | None
    vendor: str | None
    flags: frozenset[str] | None
    architecture: str | None
    text: str

    def processors(self) -> dict[int, dict[str, str]]:
        """The entries by CPU number."""
        found: dict[int, dict[str, str]] = {}
        entry: dict[str, str] = {}
        for line in self.text.splitlines():
            key, colon, value = line.partition(":")
            key, value = key.strip(), value.strip()
            if not colon:
                continue
            if key == "processor":
                entry = {}
                if re.fullmatch(r"[0-9]{1,5}", value):
                    found[int(value)] = entry
            entry[key] = value
        return found


def read_cpuinfo(reader: Reader) -> CpuInfo:
    """Read /proc/cpuinfo of any architecture; what it does not say is None."""
    text = reader.text("/proc/cpuinfo") or ""
    first: dict[str, str] = {}
    # The first entry is enough, and there may be hundreds.
    for line in text[:65536].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "processor" and "processor" in first:
            break
        first.setdefault(key.strip(), value.strip())
    architecture = "x86_64" if "flags" in first else "aarch64" if "Features" in first else None
    if reader.machine.live:
        architecture = os.uname().machine
    flags = first.get("flags") or first.get("Features")
    vendor = first.get("vendor_id") or _IMPLEMENTERS.get(first.get("CPU implementer", ""))
    return CpuInfo(
        model=tidy(first.get("model name", "")),
        vendor=tidy(vendor or ""),
        flags=frozenset(flags.split()) if flags else None,
        architecture=architecture,
        text=text,
    )


def isa(flags: Iterable[str]) -> tuple[str, ...]:
    """The flags that matter to inference, in a fixed order."""
    flags = frozenset(flags)
    return tuple(name for name in _ISA if name in flags)


def probe_cpu(reader: Reader, info: CpuInfo, problems: list[Problem]) -> Cpu:
    """Read the topology of the online processors."""
    folders = _numbered(reader, f"{_CPU}/cpu[0-9]*", "cpu")
    online = _online(reader, info, folders, problems)
    known = sorted(online or ())
    cores, packages = _cores(reader, known if folders else [])
    if cores is None and online:
        cores, packages = _cores_of_cpuinfo(info, online)
    if cores is None:
        problems.append(
            Problem(
                what="cores are unknown",
                why=f"neither {_CPU}/cpu*/topology nor /proc/cpuinfo says which CPUs share a core",
            )
        )
    per_core = max(map(len, cores)) if cores else None
    active = reader.number(f"{_CPU}/smt/active")
    smt = per_core > 1 if per_core else None
    return Cpu(
        model=info.model,
        vendor=info.vendor,
        architecture=info.architecture,
        sockets=packages,
        cores=len(cores) if cores else None,
        threads=len(known) or None,
        threads_per_core=per_core,
        online=format_cpulist(known) or None,
        allowed=_allowed(reader, online, problems),
        siblings=tuple(format_cpulist(core) for core in cores or ()),
        isa=isa(info.flags or ()),
        smt=bool(active) if active is not None else smt,
        l3=_l3(reader, known if folders else []),
        numa=_numa(reader, online, problems),
        governor=_governor(reader, known if folders else []),
    )


def _numbered(reader: Reader, pattern: str, prefix: str) -> frozenset[int]:
    """Numbers of folders such as cpu12: never more than a machine can have."""
    names = (path.rpartition("/")[2] for path in reader.machine.glob(pattern))
    matches = (re.fullmatch(prefix + "([0-9]{1,5})", name) for name in names)
    return frozenset(int(match[1]) for match in matches if match)


def _online(
    reader: Reader, info: CpuInfo, folders: frozenset[int], problems: list[Problem]
) -> frozenset[int] | None:
    # Offline CPUs have folders too, but no topology; so the list decides, not the folders.
    online = reader.cpus(f"{_CPU}/online")
    if not online:
        online = frozenset(info.processors())
        if not online:
            problems.append(
                Problem(
                    what="processors are unknown",
                    why=f"neither {_CPU}/online nor /proc/cpuinfo can be read",
                )
            )
            return None
    if folders and not online <= folders:
        lost = format_cpulist(online - folders)
        reader.damaged(f"{_CPU}/online", f"CPUs {lost} are online but have no folder")
        online &= folders
    return online or None


def _cores(reader: Reader, online: list[int]) -> tuple[Cores | None, int | None]:
    """Physical cores and the number of sockets, from the sets of CPUs that share a core.

    Core numbers would not do: they repeat over dies and sockets.
    """
    cores: list[frozenset[int]] = []
    packages: set[int | None] = set()
    covered: set[int] = set()
    everything = frozenset(online)
    for cpu in online:
        if cpu in covered:
            continue
        folder = f"{_CPU}/cpu{cpu}/topology"
        path = f"{folder}/core_cpus_list"
        shared = reader.cpus(path)
        if shared is None:
            # Its name before Linux 5.3.
            path = f"{folder}/thread_siblings_list"
            shared = reader.cpus(path)
        if shared is None:
            return None, None
        core = shared & everything
        if cpu not in core or core & covered or len(core) > _MOST_SIBLINGS:
            reader.damaged(path, f"CPU {cpu} cannot share a core with {format_cpulist(shared)!r}")
            return None, None
        covered |= core
        cores.append(core)
        packages.add(reader.number(f"{folder}/physical_package_id"))
    sockets = None if None in packages else len(packages)
    return (tuple(cores), sockets) if cores else (None, None)


def _cores_of_cpuinfo(info: CpuInfo, online: frozenset[int]) -> tuple[Cores | None, int | None]:
    """The same from /proc/cpuinfo, for containers that hide the topology."""
    cores: dict[tuple[str, str], set[int]] = {}
    packages: dict[str, set[str]] = {}
    counts: dict[str, str | None] = {}
    entries = info.processors()
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


def _l3(reader: Reader, online: list[int]) -> tuple[L3, ...]:
    found: list[tuple[int | None, int | None, frozenset[int]]] = []
    everything = frozenset(online)
    covered: set[int] = set()
    for cpu in online:
        # One look a domain: hundreds of CPUs share few caches.
        folder = None if cpu in covered else _level3(reader, cpu)
        if folder is None:
            continue
        path = f"{folder}/shared_cpu_list"
        shared = reader.cpus(path)
        if shared is None:
            continue
        cpus = shared & everything
        if cpu not in cpus or cpus & covered:
            reader.damaged(path, f"CPU {cpu} cannot share an L3 with {format_cpulist(shared)!r}")
            continue
        covered |= cpus
        found.append((reader.number(f"{folder}/id"), _size(reader, f"{folder}/size"), cpus))
    ids = [number for number, _, _ in found]
    # Older ARM kernels give no numbers: then it is the order, for all of them.
    numbered = None not in ids and len(set(ids)) == len(ids)
    return tuple(
        L3(id=number if numbered and number is not None else order, bytes=size,
           cpus=format_cpulist(cpus))
        for order, (number, size, cpus) in enumerate(found)
    )  # fmt: skip


def _level3(reader: Reader, cpu: int) -> str | None:
    folder = f"{_CPU}/cpu{cpu}/cache"
    # Almost always index3; not with a single L1 cache or with more than three levels.
    if (reader.text(f"{folder}/index3/level") or "").strip() == "3":
        return f"{folder}/index3"
    for path in reader.machine.glob(f"{folder}/index[0-9]*/level"):
        if (reader.text(path) or "").strip() == "3":
            return path.removesuffix("/level")
    return None


def _size(reader: Reader, path: str) -> int | None:
    text = reader.text(path)
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        reader.damaged(path, f"{tidy(text, most=40) or ''!r} is not a size")
        return None
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] or None


def _numa(
    reader: Reader, online: frozenset[int] | None, problems: list[Problem]
) -> tuple[NumaNode, ...]:
    numbers = sorted(_numbered(reader, f"{_NODE}/node[0-9]*", "node"))
    nodes: list[NumaNode] = []
    covered: set[int] = set()
    for number in numbers:
        folder = f"{_NODE}/node{number}"
        cpus = reader.cpus(f"{folder}/cpulist")
        if cpus is None or cpus & covered:
            # A node whose CPUs are unknown must not pass for one without any.
            problems.append(
                Problem(
                    what="NUMA layout is unknown",
                    why=f"{folder}/cpulist "
                    + ("cannot be read" if cpus is None else "repeats CPUs of another node"),
                )
            )
            return ()
        covered |= cpus
        total = _MEM_TOTAL.search(reader.text(f"{folder}/meminfo") or "")
        nodes.append(
            NumaNode(
                id=number,
                cpus=format_cpulist(cpus if online is None else cpus & online),
                memory_bytes=int(total[1]) * 1024 if total else None,
                distances=_distances(reader, f"{folder}/distance", len(numbers)),
            )
        )
    return tuple(nodes)


def _distances(reader: Reader, path: str, nodes: int) -> tuple[int, ...]:
    text = reader.text(path)
    if text is None:
        return ()
    words = text.split()
    if len(words) != nodes or not all(re.fullmatch("[0-9]{1,3}", word) for word in words):
        reader.damaged(path, f"{tidy(text, most=40) or ''!r} is not a distance to {nodes} nodes")
        return ()
    return tuple(map(int, words))


def _governor(reader: Reader, online: list[int]) -> str | None:
    found: str | None = None
    for cpu in online:
        governor = reader.line(f"{_CPU}/cpu{cpu}/cpufreq/scaling_governor")
        if governor is not None and found not in (None, governor):
            return "mixed"
        found = governor or found
    return found


def _allowed(reader: Reader, online: frozenset[int] | None, problems: list[Problem]) -> str | None:
    path = "/proc/self/status"
    allowed = online
    line = _ALLOWED.search(reader.text(path) or "")
    if line:
        try:
            listed = cpu_set(line[1])
            allowed = listed if allowed is None else allowed & listed
        except StackctlError:
            reader.damaged(path, "its Cpus_allowed_list is not a CPU list")
    if reader.machine.live:
        affinity = frozenset(os.sched_getaffinity(0))
        allowed = affinity if allowed is None else allowed & affinity
    if allowed is not None and not allowed:
        problems.append(
            Problem(
                what="usable processors are unknown",
                why=f"{path} allows none of the CPUs that are online",
            )
        )
    return format_cpulist(allowed) or None if allowed is not None else None
