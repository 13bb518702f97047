"""How a unit waits for its GPUs: at boot their CDI file may come after the units, as shell text.

The file is made anew at each boot, by a service that itself waits for the driver. No order of units
helps: a user's units know none of the system's, and that service may succeed late. Without the file
Podman fails at once, and systemd would give up after a quarter of a minute.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

#: Seconds that one start waits, and between two looks. Three starts are six minutes; after that
#: somebody must look at the driver, and restart the stack.
WAIT_S = 120
PAUSE_S = 2
#: Where Podman looks, and what it reads there.
_FILES = " ".join(f"/{top}/cdi/*.{end}" for top in ("etc", "run") for end in ("json", "yaml"))
_SAYS = "no file in /etc/cdi or /run/cdi describes"
_SAID = re.compile(rf"^(?P<waits>waits: )?{_SAYS} (?P<kind>\S+)$")


def command(devices: Iterable[str]) -> tuple[str, ...]:
    """Waits until files describe devices of these kinds; exits 1 when none came in WAIT_S.

    Whether such a file is right, Podman says after it.
    """
    kinds = sorted({device.partition("=")[0] for device in devices})
    waits = "; ".join(
        f"until grep -qsF -e {shlex.quote(kind)} {_FILES}; do "
        f"[ $n -gt 0 ] || echo waits: {_SAYS} {shlex.quote(kind)}; "
        f"[ $n -lt {WAIT_S} ] || {{ echo {_SAYS} {shlex.quote(kind)}; exit 1; }}; "
        f"n=$((n+{PAUSE_S})); sleep {PAUSE_S}; done"
        for kind in kinds
    )
    return ("/bin/sh", "-c", f"n=0; {waits}")


def missing(lines: Sequence[str], *, waits: bool) -> str | None:
    """The kind of device that a unit had to do without, by its log; with ``waits`` also one that it
    only waits for."""
    said = (match for line in reversed(lines) if (match := _SAID.search(line.rstrip())))
    return next((match["kind"] for match in said if waits or match["waits"] is None), None)
