"""All items in the order in which they are done: each makes the ones after it possible."""

from __future__ import annotations

from collections.abc import Callable, Collection

from stackctl.provision import gpu, kernel, software, users
from stackctl.provision.facts import Facts, Needs
from stackctl.values.provision import ItemPlan

#: Limits come before lingering: what it starts has them from the beginning.
ITEMS: dict[str, Callable[[Facts, Needs], ItemPlan]] = {
    "podman": software.podman,
    "service-user": users.service_user,
    "subids": users.subids,
    "cpuset": users.cpuset,
    "memlock": users.memlock,
    "linger": users.linger,
    "numa-balancing": kernel.numa_balancing,
    "transparent-hugepages": kernel.hugepages,
    "swappiness": kernel.swappiness,
    "governor": kernel.governor,
    "models": software.models,
    "driver-hold": software.driver_hold,
    "cdi": gpu.cdi,
    "selinux": gpu.selinux,
    "stackctl": software.program,
    "guard": software.guard,
}


def plan(facts: Facts, needs: Needs, only: Collection[str] = ()) -> tuple[ItemPlan, ...]:
    """What each item, or each one named, would change."""
    return tuple(look(facts, needs) for name, look in ITEMS.items() if not only or name in only)
