"""Settings of the kernel that decide how steadily an engine runs."""

from __future__ import annotations

from typing import Literal

from stackctl.probe.reading import Reader


def numa_balancing(reader: Reader) -> bool | None:
    """Whether the kernel moves pages between NUMA nodes on its own."""
    mode = reader.number("/proc/sys/kernel/numa_balancing")
    return None if mode is None else mode != 0


def swappiness(reader: Reader) -> int | None:
    """How willingly the kernel swaps, 0 to 200."""
    return reader.number("/proc/sys/vm/swappiness")


def selinux(reader: Reader) -> Literal["enforcing", "permissive", "disabled"] | None:
    """What SELinux does here; None on a recording that does not say."""
    enforcing = reader.number("/sys/fs/selinux/enforce")
    if enforcing is not None:
        return "enforcing" if enforcing else "permissive"
    return "disabled" if reader.machine.live else None


def selinux_devices(reader: Reader) -> bool | None:
    """Whether SELinux lets containers use devices; None where it does not say."""
    # Two numbers: the value now, and the one to be committed.
    said = reader.line("/sys/fs/selinux/booleans/container_use_devices") or ""
    return {"1": True, "0": False}.get(said[:1])


def apparmor(reader: Reader) -> bool | None:
    """Whether AppArmor is on; None on a recording that does not say."""
    enabled = reader.line("/sys/module/apparmor/parameters/enabled")
    if enabled in ("Y", "N"):
        return enabled == "Y"
    return False if reader.machine.live else None
