"""Facts of the processors from /proc/cpuinfo, on any architecture, else from py-cpuinfo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from stackctl.machine.runner import controlled_environment
from stackctl.probe.background import Background
from stackctl.probe.fact_reader import FactReader, sanitize
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
