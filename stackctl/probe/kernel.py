"""Settings of the kernel that have an effect on engines."""

from __future__ import annotations

from typing import Literal

from stackctl.probe.fact_reader import FactReader


def numa_balancing(reader: FactReader) -> bool | None:
    """Return True if the kernel moves pages between NUMA nodes by itself; None if unknown."""
    mode = reader.number("/proc/sys/kernel/numa_balancing")
    return None if mode is None else mode != 0


def swappiness(reader: FactReader) -> int | None:
    """Return vm.swappiness, from 0 (least swapping) to 200; None if unknown."""
    return reader.number("/proc/sys/vm/swappiness")


def selinux(reader: FactReader) -> Literal["enforcing", "permissive", "disabled"] | None:
    """Return the mode of SELinux; None on a recording without it."""
    enforcing = reader.number("/sys/fs/selinux/enforce")
    if enforcing is not None:
        return "enforcing" if enforcing else "permissive"
    return "disabled" if reader.machine.live else None


def selinux_devices(reader: FactReader) -> bool | None:
    """Return True if SELinux lets containers use devices; None if its boolean is absent."""
    # The file holds two numbers: the current value, and the value after a commit.
    said = reader.line("/sys/fs/selinux/booleans/container_use_devices") or ""
    return {"1": True, "0": False}.get(said[:1])


def apparmor(reader: FactReader) -> bool | None:
    """Return True if AppArmor is on; None on a recording without its state."""
    enabled = reader.line("/sys/module/apparmor/parameters/enabled")
    if enabled in ("Y", "N"):
        return enabled == "Y"
    return False if reader.machine.live else None
