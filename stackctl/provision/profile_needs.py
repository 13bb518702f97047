"""The needs that profiles have of a machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stackctl.engines import uses_gpu
from stackctl.requirements.facts import StackNeeds
from stackctl.values.host import Host
from stackctl.values.profile import Profile


def binds_cpus(profile: Profile) -> bool:
    """Return True if a profile asks for certain CPUs or NUMA nodes."""
    return profile.placement.cpus is not None or profile.placement.nodes is not None


def needs_of_profiles(
    profiles: Sequence[Profile], host: Host, named: Collection[str]
) -> StackNeeds:
    """Return the needs of some profiles; without profiles those of any stack that may come.

    ``named`` are the items that the user asked for by name.
    """
    several = len(host.cpu.numa) > 1
    if not profiles:
        return StackNeeds(cpuset=several, named=frozenset(named))
    gpu = [uses_gpu(profile) for profile in profiles]
    return StackNeeds(
        gpu=any(gpu),
        # A model in GPU memory is not locked in main memory.
        memlock=not all(gpu),
        cpuset=several or any(map(binds_cpus, profiles)),
        named=frozenset(named),
    )
