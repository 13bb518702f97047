"""Kinds of cores on hybrid processors."""

from __future__ import annotations

from stackctl.probe.fact_reader import FactReader
from stackctl.probe.topology import CPU
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import CoreKind

#: Kinds, fastest first, with the device whose folder lists their CPUs on hybrid processors.
_KINDS = (("performance", "cpu_core"), ("efficient", "cpu_atom"), ("low-power", "cpu_lowpower"))


#: Cores whose clocks differ by more than this ratio are of two kinds. Favoured cores of one kind
#: ("turbo boost max", preferred cores) are some percent faster, cores under a stacked cache some
#: percent slower.
_CLOCK_RATIO = 1.2


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
