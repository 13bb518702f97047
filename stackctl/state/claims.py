"""Claims of declared stacks, machine-wide: each installed unit carries its own.

Units of the system are readable by everybody; those of users by themselves and by root. So nothing
has to be registered, and a claim ends with its unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from stackctl.errors import StackctlError
from stackctl.machine.files import Machine
from stackctl.state.paths import Paths
from stackctl.values.base import from_json
from stackctl.values.claim import Claim
from stackctl.values.cpulist import parse_cpulist

_CLAIM = re.compile(r"^Claim=(.*)$", re.MULTILINE)
_UNITS = "containers/systemd/stackctl"


def binding(machine: Machine, paths: Paths) -> tuple[Claim, ...]:
    """The claims that can keep this user from something: for root none of ordinary users' homes."""
    return _read(machine, paths, homes=() if os.geteuid() == 0 else machine.glob("/home/*"))


def declared(machine: Machine, paths: Paths) -> tuple[Claim, ...]:
    """Claims of all stacks whose units this process may read; its own scope's first.

    What other users wrote is data, and no more of it is read than a few units have.
    """
    return _read(machine, paths, homes=machine.glob("/home/*"))


def _read(machine: Machine, paths: Paths, *, homes: Sequence[str]) -> tuple[Claim, ...]:
    places = [(str(paths.units), ""), (f"/etc/{_UNITS}", "")]
    places += [(home, f".config/{_UNITS}") for home in ("/root", *homes)]
    files = dict(
        found for home, below in places for found in machine.owned_texts(home, below, ".container")
    )
    claims = []
    for path, text in files.items():
        match = _CLAIM.search(text)
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
