"""Processors: their layout, their state and their limits, from /proc and /sys."""

from __future__ import annotations

import os
import re

from stackctl.errors import StackctlError
from stackctl.probe.cgroup import cpu_quota, cpuset
from stackctl.probe.cpuinfo import CpuInfo, isa
from stackctl.probe.fact_reader import FactReader, cpu_set
from stackctl.probe.numa import probe_numa
from stackctl.probe.topology import (
    CPU,
    cores_of_entries,
    probe_core_types,
    probe_cores,
    probe_groups,
    probe_l3,
)
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Cpu

#: AMD families whose "siblings" are cores that share a floating-point unit (Bulldozer, Jaguar).
_SHARING_FAMILIES = ("21", "22")

_ALLOWED = re.compile(r"^Cpus_allowed_list:[ \t]*(.*)$", re.MULTILINE)


def probe_cpu(reader: FactReader, info: CpuInfo, *, total_bytes: int | None = None) -> Cpu:
    """Read the topology of the online processors.

    Args:
        reader: the source of the facts.
        info: the content of /proc/cpuinfo.
        total_bytes: the machine's memory; if the kernel shows no nodes, its only node has it.
    """
    folders = reader.numbers(f"{CPU}/cpu")
    online = _online(reader, info, folders)
    known = sorted(online or ())
    sysfs = known if folders else []
    cores, packages = _cores_and_packages(reader, info, sysfs, online or frozenset())
    per_core = max(map(len, cores), default=None)
    offline = folders - online if online else frozenset[int]()
    return Cpu(
        model=info.model,
        vendor=info.vendor,
        architecture=info.architecture,
        sockets=packages,
        cores=len(cores) or None,
        threads=len(known) or None,
        threads_per_core=per_core,
        online=CpuList(known) or None,
        allowed=_allowed(reader, online),
        siblings=tuple(CpuList(core) for core in cores),
        isa=isa(info.flags or ()),
        smt=_smt(reader, per_core),
        l3=probe_l3(reader, sysfs, cores),
        numa=probe_numa(reader, online, total_bytes),
        governor=_common(reader, sysfs, "scaling_governor"),
        dies=probe_groups(reader, sysfs, "die"),
        offline=CpuList(offline) or None,
        kinds=probe_core_types(reader, online or frozenset()),
        quota_cpus=cpu_quota(reader),
        governor_driver=_driver(reader, sysfs),
    )


def _cores_and_packages(
    reader: FactReader,
    info: CpuInfo,
    sysfs: list[int],
    online: frozenset[int],
) -> tuple[tuple[frozenset[int], ...], int | None]:
    """Return the CPUs of each core and the number of packages, from /sys, else /proc/cpuinfo."""
    sharing = info.vendor == "AuthenticAMD" and info.family in _SHARING_FAMILIES
    cores = probe_cores(reader, sysfs, by_number=sharing)
    packages = probe_groups(reader, sysfs, "package")
    if cores is None and online:
        cores, counted = cores_of_entries(info.processors(), online)
        packages = packages or counted
    if cores is None:
        reader.note_unknown(
            "cores-unknown",
            "cores are unknown",
            f"neither {CPU}/cpu*/topology nor /proc/cpuinfo says which CPUs share a core",
        )
    return tuple(cores or ()), packages


def _smt(reader: FactReader, per_core: int | None) -> bool | None:
    if per_core:
        return per_core > 1
    # Virtual machines may report this wrongly, so it is read only if no siblings are shown.
    active = reader.number(f"{CPU}/smt/active")
    return None if active is None else bool(active)


def _online(reader: FactReader, info: CpuInfo, folders: frozenset[int]) -> frozenset[int] | None:
    # Offline CPUs have folders too, but no topology, so the list decides, not the folders.
    online = reader.cpus(f"{CPU}/online")
    described = reader.numbers(f"{CPU}/cpu", "/topology")
    if not online and described:
        # Kernels before 2.6.37 have no list. Each CPU has a file instead, if it can go offline.
        online = frozenset(cpu for cpu in described if reader.number(f"{CPU}/cpu{cpu}/online") != 0)
    if not online:
        online = frozenset(info.processors())
        if not online:
            reader.note_unknown(
                "cpus-unknown",
                "processors are unknown",
                f"neither {CPU}/online nor /proc/cpuinfo can be read",
            )
            return None
    if folders and not online <= folders:
        lost = CpuList(online - folders)
        reader.note_damaged(f"{CPU}/online", f"CPUs {lost} are online but have no folder")
        online &= folders
    if described and not online <= described:
        lost = CpuList(online - described)
        reader.note_damaged(f"{CPU}/online", f"CPUs {lost} are online but have no topology")
        online &= described
    return online or None


def _common(reader: FactReader, online: list[int], name: str) -> str | None:
    """Return the frequency setting that all CPUs share, or "mixed"; None if unknown."""
    found: str | None = None
    for cpu in online:
        said = reader.line(f"{CPU}/cpu{cpu}/cpufreq/{name}")
        if said is not None and found not in (None, said):
            return "mixed"
        found = said or found
    return found


def _driver(reader: FactReader, online: list[int]) -> str | None:
    """Return the driver that sets frequencies, with its mode in brackets if it has one."""
    driver = _common(reader, online[:1], "scaling_driver")
    for name in ("amd_pstate", "intel_pstate"):
        status = reader.line(f"{CPU}/{name}/status")
        if status is not None and (driver is None or driver.replace("-", "_").startswith(name)):
            return f"{driver or name} ({status})"
    return driver


def _allowed(reader: FactReader, online: frozenset[int] | None) -> CpuList | None:
    path = "/proc/self/status"
    allowed = online
    line = _ALLOWED.search(reader.text(path) or "")
    if line:
        try:
            listed = cpu_set(line[1])
            allowed = listed if allowed is None else allowed & listed
        except StackctlError:
            reader.note_damaged(path, "its Cpus_allowed_list is not a CPU list")
    if reader.machine.live:
        affinity = frozenset(os.sched_getaffinity(0))
        allowed = affinity if allowed is None else allowed & affinity
    left = cpuset(reader)
    # A cpuset without any of these CPUs is not this process's: the mount shows other cgroups.
    if left is not None and (allowed is None or left & allowed):
        allowed = left if allowed is None else allowed & left
    if allowed is not None and not allowed:
        reader.note_unknown(
            "usable-cpus-unknown",
            "usable processors are unknown",
            f"{path} allows none of the CPUs that are online",
        )
    return CpuList(allowed or ()) or None
