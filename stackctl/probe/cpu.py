"""Processors: names, layout, state and limits, from /proc and /sys, else from py-cpuinfo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from stackctl.errors import StackctlError
from stackctl.machine.runner import controlled_environment
from stackctl.probe.background import Background
from stackctl.probe.cgroup import cpu_quota, cpuset
from stackctl.probe.fact_reader import FactReader, cpu_set, sanitize
from stackctl.probe.memory import probe_numa
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

#: Seconds in which py-cpuinfo must answer.
_PATIENCE_S = 5.0
#: The instruction sets by which engines choose their code, weakest first, as Linux names them.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip

#: Makers of ARM servers by "CPU implementer".
_IMPLEMENTERS = {"0x41": "ARM", "0x48": "HiSilicon", "0x4e": "NVIDIA", "0x61": "Apple",
                 "0xc0": "Ampere"}  # fmt: skip


#: Cores of machines that serve models, by implementer and part: Linux, asm/cputype.h of arm64.
_PARTS = {
    ("0x41", "0xd08"): "Cortex-A72", ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd8e"): "Neoverse-N3", ("0x41", "0xd84"): "Neoverse-V3",
    ("0x41", "0xd85"): "Cortex-X925", ("0x41", "0xd87"): "Cortex-A725",
    ("0x48", "0xd01"): "TaiShan-v110", ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1a",
}  # fmt: skip

#: Keys of the processor's name: x86 and ia64, LoongArch, MIPS, POWER and SPARC, RISC-V, old ARM.
_MODEL_KEYS = ("model name", "Model Name", "cpu model", "cpu", "uarch", "Processor")
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


@dataclass(frozen=True)
class CpuInfo:
    """Facts of the first processor in /proc/cpuinfo, and its text for facts of each."""

    model: str | None
    vendor: str | None
    flags: frozenset[str] | None
    architecture: str | None
    #: The family number, which x86 processors have.
    family: str | None
    #: True if the processor shows the flag "hypervisor".
    virtual: bool
    text: str

    def processors(self) -> dict[int, dict[str, str]]:
        """Return keys and values of each entry, by CPU number."""
        return _processors(self.text)


def read_cpuinfo(reader: FactReader) -> CpuInfo:
    """Read /proc/cpuinfo of any architecture; facts that are missing in it are None."""
    text = reader.text("/proc/cpuinfo") or ""
    first: dict[str, str] = {}
    # There may be hundreds of entries, but the first has all keys. On old ARM some keys follow the
    # last entry.
    for line in (*text[:65536].splitlines(), *text[-4096:].splitlines()):
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    if reader.machine.live:
        architecture: str | None = os.uname().machine
    else:
        architecture = reader.line("/proc/sys/kernel/arch") or _architecture(first)
    flags = first.get("flags") or first.get("Features")
    maker = first.get("vendor_id") or first.get("vendor")
    vendor = maker or _IMPLEMENTERS.get(first.get("CPU implementer", ""))
    models = (sanitize(first.get(key, "")) for key in _MODEL_KEYS)
    return CpuInfo(
        model=next(filter(None, models), None) or _parts(text),
        vendor=sanitize(vendor or ""),
        flags=frozenset(flags.split()) if flags else None,
        architecture=architecture,
        family=first.get("cpu family"),
        virtual="hypervisor" in (flags or "").split(),
        text=text,
    )


def _processors(text: str) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    entry: dict[str, str] = {}
    for line in text.splitlines():
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


def _architecture(first: Mapping[str, str]) -> str | None:
    """Return the name that uname gives; None if unclear, as on POWER (either byte order)."""
    if "flags" in first:
        return "x86_64"
    if "CPU implementer" in first:
        # 32-bit kernels list other features ("half", "thumb") of the same processors.
        return "aarch64" if {"fp", "asimd"} & set(first.get("Features", "").split()) else "arm"
    if "IA-64" in first.get("arch", ""):
        return "ia64"
    if first.get("vendor_id") == "IBM/S390":
        return "s390x"
    found = re.match("rv(32|64)", first.get("isa", ""))
    if found:
        return f"riscv{found[1]}"
    return "loongarch64" if "loongarch64" in first.get("ISA", "").split() else None


def _parts(text: str) -> str | None:
    """Return the names of ARM cores, one for each kind; the kernel lists only numbers."""
    names = (
        _PARTS.get((entry.get("CPU implementer", ""), entry.get("CPU part", "")))
        for entry in _processors(text).values()
    )
    return " + ".join(dict.fromkeys(filter(None, names))) or None


def isa(flags: Iterable[str]) -> tuple[str, ...]:
    """Return the flags that matter to inference, in a fixed order."""
    flags = frozenset(flags)
    return tuple(name for name in _ISA if name in flags)


class CpuInfoFallback:
    """A query of py-cpuinfo in the background: it starts processes and takes about a second."""

    def __init__(self) -> None:
        # py-cpuinfo searches the programs that it starts in PATH.
        os.environ["PATH"] = controlled_environment()["PATH"]
        self._answer = Background(_ask_library, _PATIENCE_S)

    def complete(self, cpu: Cpu) -> Cpu:
        """Return ``cpu`` with name and instruction sets filled in if the kernel gave none."""
        answer = self._answer.result() or {}
        brand, flags = answer.get("brand_raw"), answer.get("flags")
        if cpu.model is None and isinstance(brand, str):
            cpu = msgspec.structs.replace(cpu, model=sanitize(brand))
        if not cpu.isa and isinstance(flags, list):
            cpu = msgspec.structs.replace(cpu, isa=isa(str(flag) for flag in flags))
        return cpu


def _ask_library() -> dict[str, Any]:
    try:
        import cpuinfo

        return dict(cpuinfo.get_cpu_info())
    except (Exception, SystemExit):
        # py-cpuinfo raises plain Exception on unknown architectures.
        return {}
