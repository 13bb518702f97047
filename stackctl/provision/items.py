"""The needs that profiles have of a machine, and the plan of every provisioning item."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stackctl.engines import uses_gpu
from stackctl.requirements import ITEMS
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.user_managers import UserManagerSetting
from stackctl.values.host import Host
from stackctl.values.profile import Profile
from stackctl.values.provision import ItemPlan


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


def plan_items(
    facts: MachineFacts, needs: StackNeeds, only: Collection[str] = ()
) -> tuple[ItemPlan, ...]:
    """Return the plan of each item, or only of the items named in ``only``."""
    return tuple(
        item.plan(facts, needs) for name, item in ITEMS.items() if not only or name in only
    )


def pending_until_login(facts: MachineFacts) -> tuple[str, ...]:
    """Return one text for each setting that takes effect when the user's manager restarts."""
    if facts.user is None or facts.user.uid is None or not facts.user.running:
        return ()
    found = (item.pending(facts) for item in ITEMS.values() if isinstance(item, UserManagerSetting))
    return tuple(text for text in found if text is not None)
