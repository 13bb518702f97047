"""GPUs as their driver's library reports them, else as the PCI bus shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.probe.nvml import Nvml, NvmlDevice, NvmlReadings
from stackctl.values.host import CdiSpec, Gpu, GpuProcess

_PCI = "/sys/bus/pci/devices"
_DRIVER = "/proc/driver/nvidia/gpus"
_NVIDIA, _AMD, _INTEL = "0x10de", "0x1002", "0x8086"
#: PCI base class of display controllers, which compute-only GPUs carry too (0x0302).
_DISPLAY = "0x03"
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
_MIB = 2**20


@dataclass(frozen=True)
class KnownCard:
    """Facts of a card that its PCI id gives; bandwidth in bytes per second.

    ``memory_mib`` is the size that the driver reports, not that of the data sheet.
    """

    name: str
    memory_mib: int
    compute_capability: str
    bandwidth: float | None


_CARDS = {
    "0x2bb1": KnownCard(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "12.0", 1.792e12
    ),
    "0x2bb4": KnownCard(
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "12.0", 1.792e12
    ),
    "0x2bb5": KnownCard("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "12.0", None),
    "0x2b85": KnownCard("NVIDIA GeForce RTX 5090", 32607, "12.0", 1.792e12),
    "0x2330": KnownCard("NVIDIA H100 80GB HBM3", 81559, "9.0", 3.35e12),
    "0x2331": KnownCard("NVIDIA H100 PCIe", 81559, "9.0", 2.04e12),
    "0x2335": KnownCard("NVIDIA H200", 143771, "9.0", 4.8e12),
    "0x26b9": KnownCard("NVIDIA L40S", 46068, "8.9", 0.864e12),
    "0x2684": KnownCard("NVIDIA GeForce RTX 4090", 24564, "8.9", 1.008e12),
    "0x20b2": KnownCard("NVIDIA A100-SXM4-80GB", 81920, "8.0", 2.04e12),
    "0x20b5": KnownCard("NVIDIA A100 80GB PCIe", 81920, "8.0", 1.94e12),
}


def probe_gpus(reader: FactReader, nvml: Nvml, cdi: tuple[CdiSpec, ...]) -> tuple[Gpu, ...]:
    """Return NVIDIA's GPUs in the driver's order, which is that of their addresses; then others.

    If the library gives no readings on a live machine, it is a problem.
    """
    devices = list(_display_devices(reader))
    nvidia = [address for address, vendor in devices if vendor == _NVIDIA]
    readings = nvml.readings()
    if readings is not None and readings.devices:
        found = [
            _read(reader, index, device, readings) for index, device in enumerate(readings.devices)
        ]
    else:
        found = [
            _gpu_without_library(reader, index, address) for index, address in enumerate(nvidia)
        ]
        if nvidia and reader.machine.live:
            reader.note_unknown(
                "gpu-memory-unknown",
                "GPU memory in use is unknown",
                f"{nvml.error or 'NVML finds no GPU'}; the values shown follow from the PCI id",
                fix="pip install nvidia-ml-py" if nvml.package_missing else None,
            )
    found = [_with_cdi(gpu, cdi, alone=len(found) == 1) for gpu in found]
    for address, vendor in devices:
        if vendor != _NVIDIA:
            found.append(_other(reader, len(found), address))
    return tuple(found)


def _with_cdi(gpu: Gpu, cdi: tuple[CdiSpec, ...], *, alone: bool) -> Gpu:
    names = {name for spec in cdi for name in spec.devices}
    wanted = [f"nvidia.com/gpu={gpu.index}", f"nvidia.com/gpu={gpu.uuid}"]
    if alone:
        wanted.append("nvidia.com/gpu=all")
    fitting = next((name for name in wanted if name in names), None)
    return msgspec.structs.replace(gpu, cdi=fitting) if fitting else gpu


def _display_devices(reader: FactReader) -> Iterator[tuple[str, str]]:
    for path in reader.machine.glob(f"{_PCI}/*/vendor"):
        folder = path.removesuffix("/vendor")
        address = folder.rpartition("/")[2]
        vendor = reader.line(path)
        if not _ADDRESS.fullmatch(address) or vendor not in (_NVIDIA, _AMD, _INTEL):
            continue
        if (reader.line(f"{folder}/class") or "").startswith(_DISPLAY):
            yield address, vendor


def _read(reader: FactReader, index: int, device: NvmlDevice, readings: NvmlReadings) -> Gpu:
    address = _address(device.pci)
    folder = f"{_PCI}/{address}"
    card = _CARDS.get(reader.line(f"{folder}/device") or "") if address else None
    if device.memory_bus_bits and device.memory_clock_mhz:
        # Two transfers per clock: the library counts the clocks of all kinds of memory so.
        bandwidth: float | None = 2e6 * device.memory_clock_mhz * device.memory_bus_bits / 8
    else:
        bandwidth = card.bandwidth if card else None
    return Gpu(
        index=index,
        name=sanitize(device.name or ""),
        uuid=sanitize(device.uuid or ""),
        memory_bytes=device.memory_bytes,
        compute_capability=device.compute_capability,
        driver=readings.driver,
        pci=address,
        numa_node=reader.number(f"{folder}/numa_node") if address else None,
        free_bytes=device.free_bytes,
        bandwidth_bytes_s=bandwidth,
        cuda=readings.cuda,
        power_limit_w=device.power_limit_w,
        pcie=_link(device.pcie_generation, device.pcie_width) or _pcie(reader, folder),
        processes=tuple(
            GpuProcess(
                pid=process.pid,
                command=process.command or reader.line(f"/proc/{process.pid}/comm"),
                memory_bytes=process.memory_bytes,
            )
            for process in device.processes or ()
        ),
    )


def _gpu_without_library(reader: FactReader, index: int, address: str) -> Gpu:
    """Return a GPU without its library: from the bus, the driver's files and the table of cards."""
    folder = f"{_PCI}/{address}"
    card = _CARDS.get(reader.line(f"{folder}/device") or "")
    information = _information(reader, address)
    return Gpu(
        index=index,
        name=information.get("Model") or (card.name if card else None),
        uuid=information.get("GPU UUID"),
        memory_bytes=card.memory_mib * _MIB if card else None,
        compute_capability=card.compute_capability if card else None,
        driver=reader.line("/sys/module/nvidia/version"),
        pci=address,
        numa_node=reader.number(f"{folder}/numa_node"),
        bandwidth_bytes_s=card.bandwidth if card else None,
        pcie=_pcie(reader, folder),
    )


def _other(reader: FactReader, index: int, address: str) -> Gpu:
    """Return a GPU of another maker; its memory is known if the driver is amdgpu."""
    folder = f"{_PCI}/{address}"
    total = reader.number(f"{folder}/mem_info_vram_total")
    used = reader.number(f"{folder}/mem_info_vram_used")
    return Gpu(
        index=index,
        pci=address,
        numa_node=reader.number(f"{folder}/numa_node"),
        memory_bytes=total,
        free_bytes=max(0, total - used) if total is not None and used is not None else None,
        pcie=_pcie(reader, folder),
    )


def _information(reader: FactReader, address: str) -> dict[str, str]:
    text = reader.text(f"{_DRIVER}/{address}/information") or ""
    pairs = (line.partition(":") for line in text[:8192].splitlines())
    named = ((key.strip(), sanitize(value)) for key, _, value in pairs)
    # Without permission, the driver writes question marks into the UUID.
    return {key: value for key, value in named if value and "?" not in value}


def _address(pci: str | None) -> str | None:
    """Return an address in the kernel's form, with a domain of four digits unless it needs more."""
    text = (pci or "").strip().lower()
    domain, colon, rest = text.partition(":")
    if len(domain) == 8 and domain.startswith("0000"):
        domain = domain[4:]
    address = f"{domain}{colon}{rest}"
    return address if _ADDRESS.fullmatch(address) else None


def _pcie(reader: FactReader, folder: str) -> str | None:
    speed = (reader.line(f"{folder}/max_link_speed") or "").partition(" ")[0]
    width = reader.line(f"{folder}/current_link_width") or ""
    lanes = int(width) if re.fullmatch("[0-9]{1,2}", width) else None
    return _link(_GENERATIONS.get(speed), lanes)


def _link(generation: int | None, lanes: int | None) -> str | None:
    # The kernel reports 63 lanes for a device of unknown width.
    return f"gen{generation} x{lanes}" if generation and lanes and lanes <= 32 else None
