"""The private port of an engine behind a front door."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from stackctl.errors import StackctlError
from stackctl.machine import ports
from stackctl.machine.machine import Machine
from stackctl.state.generations import Generations
from stackctl.values.claim import Claim
from stackctl.values.profile import Profile

#: Below the range that Linux gives to outgoing connections, by default.
_FIRST_PORT, _LAST_PORT = 20000, 32000


def allocate_engine_port(
    machine: Machine, store: Generations, profile: Profile, declared: Sequence[Claim]
) -> int:
    """Return a port that nothing uses or claims, for an engine behind a front door.

    Ports of stored generations are left out, so that a rollback finds its own port free.

    Raises:
        StackctlError: every port of the range is taken.
    """
    taken = {port for claim in declared for port in (claim.port, claim.engine_port)}
    for stack in store.stacks():
        for number in store.numbers(stack):
            # Nobody can roll back to a damaged generation, so its port is not kept.
            with contextlib.suppress(StackctlError):
                taken.add(store.read(stack, number).plan.engine_port)
    taken |= ports.reserved_ports(machine)
    span = _LAST_PORT - _FIRST_PORT
    # Different users begin at different ports, in case they choose at the same moment.
    start = ((profile.port or 8080) + 1009 * os.getuid()) % span
    found = [_FIRST_PORT + (start + step) % span for step in range(span)]
    found = [port for port in found if port not in taken]
    # Ports of the range for outgoing connections come last: a connection may take such a port while
    # the engine is down.
    risky = ports.ephemeral_ports(machine)
    for port in sorted(found, key=lambda port: port in risky):
        if ports.listener(machine, port) is None:
            return port
    raise StackctlError(
        f"no free port between {_FIRST_PORT} and {_LAST_PORT} for the engine",
        hint="stackctl prune STACK forgets old generations",
    )
