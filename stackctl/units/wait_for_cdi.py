"""A shell command with which a unit waits for its GPUs: at boot their CDI file may come late.

At each boot a service writes the file anew, after the driver has loaded. Ordering units does not
help: units of a user cannot be ordered after one of the system, and that service may succeed late.
Without the file Podman fails at once, and systemd would give up after a quarter of a minute.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

#: Seconds that one start waits, and seconds between two polls. Three starts are six minutes; then
#: the driver needs an administrator, who restarts the stack afterwards.
WAIT_S = 120
PAUSE_S = 2
#: The folders that Podman searches, and the file names that it reads there.
_FILES = " ".join(f"/{top}/cdi/*.{end}" for top in ("etc", "run") for end in ("json", "yaml"))
_SAYS = "no file in /etc/cdi or /run/cdi describes"
_SAID = re.compile(rf"^(?P<waits>waits: )?{_SAYS} (?P<kind>\S+)$")


def wait_command(devices: Iterable[str]) -> tuple[str, ...]:
    """Return a command that waits until files describe devices of these kinds.

    It exits 1 when none came in WAIT_S. Podman checks the content of the file afterwards.
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


def missing_device(lines: Sequence[str], *, waits: bool) -> str | None:
    """Return the kind of device that a unit's log reports as missing; None without one.

    With ``waits`` a device counts too for which the unit still waits."""
    said = (match for line in reversed(lines) if (match := _SAID.search(line.rstrip())))
    return next((match["kind"] for match in said if waits or match["waits"] is None), None)
