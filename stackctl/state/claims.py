"""Claims of declared stacks, machine-wide: each installed unit carries its own.

Units of the system are readable by everybody; those of users by themselves and by root. So nothing
has to be registered, and a claim ends with its unit.
"""

from __future__ import annotations

import re

from stackctl.errors import StackctlError
from stackctl.machine.files import Machine
from stackctl.state.paths import Paths
from stackctl.values.base import from_json
from stackctl.values.claim import Claim
from stackctl.values.cpulist import parse_cpulist

_CLAIM = re.compile(r"^Claim=(.*)$", re.MULTILINE)
_ELSEWHERE = (
    "/etc/containers/systemd/stackctl/*/*.container",
    "/root/.config/containers/systemd/stackctl/*/*.container",
    "/home/*/.config/containers/systemd/stackctl/*/*.container",
)


def declared(machine: Machine, paths: Paths) -> tuple[Claim, ...]:
    """Claims of all stacks whose units this process may read; its own scope's first."""
    patterns = (f"{paths.units}/*/*.container", *_ELSEWHERE)
    files = dict.fromkeys(path for pattern in patterns for path in machine.glob(pattern))
    claims = []
    for path in files:
        match = _CLAIM.search(machine.read(path) or "")
        if match is None:
            continue
        try:
            claim = from_json(match[1], Claim, where=path)
            parse_cpulist(claim.cpus)
        except StackctlError:
            continue  # damaged, or of another version: it claims nothing we could count
        if min((claim.memory_bytes, *(share.bytes for share in claim.gpus))) >= 0:
            claims.append(claim)
    return tuple(claims)
