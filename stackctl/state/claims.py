"""Claims of declared stacks, machine-wide: each installed unit carries its own.

System units are readable by all users; units of a user by that user and by root. No registry is
needed, because a claim ends with its unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.state.paths import Paths
from stackctl.values.base import from_json
from stackctl.values.plan import Claim

_CLAIM = re.compile(r"^Claim=(.*)$", re.MULTILINE)
_UNITS = "containers/systemd/stackctl"


def enforceable_claims(machine: Machine, paths: Paths) -> tuple[Claim, ...]:
    """Return the claims that bind this user. Claims in ordinary users' homes do not bind root."""
    return _read(machine, paths, homes=() if os.geteuid() == 0 else machine.glob("/home/*"))


def installed_claims(machine: Machine, paths: Paths) -> tuple[Claim, ...]:
    """Return claims of all stacks whose units this process may read, its own scope first.

    Files of other users are untrusted data: the number of bytes read of each is limited.
    """
    return _read(machine, paths, homes=machine.glob("/home/*"))


def _read(machine: Machine, paths: Paths, *, homes: Sequence[str]) -> tuple[Claim, ...]:
    places = [(str(paths.units), ""), (f"/etc/{_UNITS}", "")]
    places += [(home, f".config/{_UNITS}") for home in ("/root", *homes)]
    files = dict(
        found
        for home, below in places
        for found in machine.read_user_files(home, below, ".container")
    )
    claims = []
    for path, text in files.items():
        match = _CLAIM.search(text)
        if match is None:
            continue
        try:
            claim = from_json(match[1], Claim, where=path)
        except StackctlError:
            continue  # damaged, or of another version: its claim is unknown
        if min((claim.memory_bytes, *(share.bytes for share in claim.gpus))) >= 0:
            claims.append(claim)
    return tuple(claims)
