"""Processors: what /proc/cpuinfo and /sys say of their kind, their state and their use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stackctl.errors import StackctlError
from stackctl.probe.cgroup import cpuset, quota
from stackctl.probe.numa import probe_numa
from stackctl.probe.reading import Reader, cpu_set, tidy
from stackctl.probe.topology import CPU, cores_of_entries, probe_cores, probe_groups, probe_l3
from stackctl.values.cpulist import format_cpulist
from stackctl.values.host import CoreKind, Cpu, Problem

#: What inference kernels are chosen by, weakest first, in the kernel's names.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

#: "CPU implementer" of the makers of ARM servers.
_IMPLEMENTERS = {"0x41": "ARM", "0x48": "HiSilicon", "0x4e": "NVIDIA", "0x61": "Apple",
                 "0xc0": "Ampere"}  # fmt: skip

#: Where the drivers of hybrid processors list the CPUs of each kind, fastest first.
_KINDS = (("performance", "cpu_core"), ("efficient", "cpu_atom"), ("low-power", "cpu_lowpower"))
#: AMD families whose "siblings" are cores that share a floating-point unit (Bulldozer, Jaguar).
_SHARING_FAMILIES = ("21", "22")

_ALLOWED = re.compile(r"^Cpus_allowed_list:[ \t]*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says: of the first processor, and of each for the fallback."""

    model: str | None
    vendor: str | None
    flags: frozenset[str] | None
    architecture: str | None
    #: The family that x86 processors give.
    family: str | None
    #: Whether it runs under a hypervisor, as far as the processor says.
    virtual: bool
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
        family=first.get("cpu family"),
        virtual="hypervisor" in (flags or "").split(),
        text=text,
    )


def isa(flags: Iterable[str]) -> tuple[str, ...]:
    """The flags that matter to inference, in a fixed order."""
    flags = frozenset(flags)
    return tuple(name for name in _ISA if name in flags)


def probe_cpu(
    reader: Reader, info: CpuInfo, problems: list[Problem], *, total_bytes: int | None = None
) -> Cpu:
    """Read the topology of the online processors.

    Args:
        reader: where the facts come from.
        info: what /proc/cpuinfo says.
        problems: what could not be read is added here.
        total_bytes: the machine's memory, which is its only node's where the kernel shows none.
    """
    folders = _numbered(reader, f"{CPU}/cpu[0-9]*", "cpu")
    online = _online(reader, info, folders, problems)
    known = sorted(online or ())
    sysfs = known if folders else []
    sharing = info.vendor == "AuthenticAMD" and info.family in _SHARING_FAMILIES
    cores = probe_cores(reader, sysfs, by_number=sharing)
    packages = probe_groups(reader, sysfs, "package")
    if cores is None and online:
        cores, counted = cores_of_entries(info.processors(), online)
        packages = packages or counted
    if cores is None:
        problems.append(
            Problem(
                what="cores are unknown",
                why=f"neither {CPU}/cpu*/topology nor /proc/cpuinfo says which CPUs share a core",
            )
        )
    per_core = max(map(len, cores)) if cores else None
    active = reader.number(f"{CPU}/smt/active")
    smt = per_core > 1 if per_core else None
    offline = folders - online if online else frozenset[int]()
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
        l3=probe_l3(reader, sysfs, cores or ()),
        numa=probe_numa(reader, online, total_bytes, problems),
        governor=_common(reader, sysfs, "scaling_governor"),
        dies=probe_groups(reader, sysfs, "die"),
        offline=format_cpulist(offline) or None,
        kinds=_kinds(reader, online or frozenset()),
        quota_cpus=quota(reader),
        governor_driver=_driver(reader, sysfs),
    )


def _numbered(reader: Reader, pattern: str, prefix: str) -> frozenset[int]:
    """Numbers of folders such as cpu12: never more than a machine can have."""
    names = (path.removesuffix("/topology").rpartition("/")[2]
             for path in reader.machine.glob(pattern))  # fmt: skip
    matches = (re.fullmatch(prefix + "([0-9]{1,5})", name) for name in names)
    return frozenset(int(match[1]) for match in matches if match)


def _online(
    reader: Reader, info: CpuInfo, folders: frozenset[int], problems: list[Problem]
) -> frozenset[int] | None:
    # Offline CPUs have folders too, but no topology; so the list decides, not the folders.
    online = reader.cpus(f"{CPU}/online")
    described = _numbered(reader, f"{CPU}/cpu[0-9]*/topology", "cpu")
    if not online and described:
        # Kernels before 2.6.37 have no list: each CPU says it of itself, or cannot go offline.
        online = frozenset(cpu for cpu in described if reader.number(f"{CPU}/cpu{cpu}/online") != 0)
    if not online:
        online = frozenset(info.processors())
        if not online:
            problems.append(
                Problem(
                    what="processors are unknown",
                    why=f"neither {CPU}/online nor /proc/cpuinfo can be read",
                )
            )
            return None
    if folders and not online <= folders:
        lost = format_cpulist(online - folders)
        reader.damaged(f"{CPU}/online", f"CPUs {lost} are online but have no folder")
        online &= folders
    if described and not online <= described:
        lost = format_cpulist(online - described)
        reader.damaged(f"{CPU}/online", f"CPUs {lost} are online but have no topology")
        online &= described
    return online or None


def _kinds(reader: Reader, online: frozenset[int]) -> tuple[CoreKind, ...]:
    """Kinds of cores, fastest first; none when all are alike."""
    sets = [
        (name, (reader.cpus(f"/sys/devices/{device}/cpus") or frozenset()) & online)
        for name, device in _KINDS
    ]
    capacities: dict[int, set[int]] = {}
    for cpu in sorted(online):
        capacity = reader.number(f"{CPU}/cpu{cpu}/cpu_capacity")
        if capacity is None:
            # All have one or none: hundreds of CPUs are not asked in vain.
            break
        capacities.setdefault(capacity, set()).add(cpu)
    present = [(name, cpus) for name, cpus in sets if cpus]
    if len(present) > 1:
        best = {cpu: capacity for capacity, cpus in capacities.items() for cpu in cpus}
        return tuple(
            CoreKind(
                name=name,
                cpus=format_cpulist(cpus),
                capacity=max((best[cpu] for cpu in cpus if cpu in best), default=None),
            )
            for name, cpus in present
        )
    if len(capacities) < 2 or sum(map(len, capacities.values())) != len(online):
        return ()
    ordered = sorted(capacities, reverse=True)
    names = ["big", *["middle"] * (len(ordered) - 2), "little"]
    return tuple(
        CoreKind(name=name, cpus=format_cpulist(capacities[capacity]), capacity=capacity)
        for name, capacity in zip(names, ordered, strict=True)
    )


def _common(reader: Reader, online: list[int], name: str) -> str | None:
    """What the frequency settings of all CPUs say, or "mixed"."""
    found: str | None = None
    for cpu in online:
        said = reader.line(f"{CPU}/cpu{cpu}/cpufreq/{name}")
        if said is not None and found not in (None, said):
            return "mixed"
        found = said or found
    return found


def _driver(reader: Reader, online: list[int]) -> str | None:
    """The driver that sets frequencies; for those with modes also the mode."""
    driver = _common(reader, online[:1], "scaling_driver")
    for name in ("amd_pstate", "intel_pstate"):
        status = reader.line(f"{CPU}/{name}/status")
        if status is not None and (driver is None or driver.replace("-", "_").startswith(name)):
            return f"{driver or name} ({status})"
    return driver


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
    left = cpuset(reader)
    # A cgroup that names none of these CPUs is not this process's: its file system is another's.
    if left is not None and (allowed is None or left & allowed):
        allowed = left if allowed is None else allowed & left
    if allowed is not None and not allowed:
        problems.append(
            Problem(
                what="usable processors are unknown",
                why=f"{path} allows none of the CPUs that are online",
            )
        )
    return format_cpulist(allowed) or None if allowed is not None else None
