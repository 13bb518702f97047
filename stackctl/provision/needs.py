"""What profiles ask of a machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stackctl.provision.facts import Needs
from stackctl.values.host import Host
from stackctl.values.profile import Profile


def of(profiles: Sequence[Profile], host: Host, named: Collection[str]) -> Needs:
    """The needs of some profiles; of none: of all that this machine could run."""
    several = len(host.cpu.numa) > 1
    if not profiles:
        return Needs(cpuset=several, named=frozenset(named))
    gpu = [_on_gpu(profile) for profile in profiles]
    binds = any(p.placement.cpus is not None or p.placement.nodes is not None for p in profiles)
    return Needs(
        gpu=any(gpu),
        # A model in GPU memory is not locked in main memory.
        memlock=not all(gpu),
        cpuset=several or binds,
        named=frozenset(named),
    )


def _on_gpu(profile: Profile) -> bool:
    wants = profile.engine == "vllm" or profile.placement.gpus is not None
    return wants and not profile.on_cpu
