"""GPUs as the PCI bus shows them; their names and memory need the driver's library."""

from __future__ import annotations

import re

from stackctl.probe.reading import Reader
from stackctl.values.host import Gpu

_PCI = "/sys/bus/pci/devices"
_NVIDIA = "0x10de"
#: PCI base class of display controllers, which compute-only GPUs carry too (0x0302).
_DISPLAY = "0x03"
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def probe_gpus(reader: Reader) -> tuple[Gpu, ...]:
    """The NVIDIA display devices in the order of their addresses, as the driver counts them."""
    found: list[Gpu] = []
    for path in reader.machine.glob(f"{_PCI}/*/vendor"):
        folder = path.removesuffix("/vendor")
        address = folder.rpartition("/")[2]
        if not _ADDRESS.fullmatch(address) or reader.line(path) != _NVIDIA:
            continue
        if not (reader.line(f"{folder}/class") or "").startswith(_DISPLAY):
            continue
        found.append(
            Gpu(
                index=len(found),
                pci=address,
                numa_node=reader.number(f"{folder}/numa_node"),
            )
        )
    return tuple(found)
