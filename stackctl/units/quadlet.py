"""Quadlet keys by the first Podman version with each, and the podman argument that replaces one.

Quadlet does not ignore a key unknown to its version: it drops the whole unit. Versions
were read from Podman's sources at each tag and from running the generators of 4.9.3 to 5.8.2.
"""

from __future__ import annotations

import re

from stackctl.errors import ExitCode, StackctlError
from stackctl.units import quoting

Version = tuple[int, int]
NEWEST: Version = (99, 0)
#: Quadlet itself came with Podman 4.4.
OLDEST: Version = (4, 4)
OLDEST_TEXT = ".".join(map(str, OLDEST))
INSTALL_PODMAN = f"install Podman {OLDEST_TEXT} or newer"

#: Key: (first version, argument for older ones; ``{}`` is the value).
_KEYS: dict[str, tuple[Version, str | None]] = {
    "Image": ((4, 4), None),
    "ContainerName": ((4, 4), None),
    "Exec": ((4, 4), None),
    "Volume": ((4, 4), None),
    "AddDevice": ((4, 4), None),
    "Network": ((4, 4), None),
    "ReadOnly": ((4, 4), None),
    "NoNewPrivileges": ((4, 4), None),
    "DropCapability": ((4, 4), None),
    "Environment": ((4, 4), None),
    "Label": ((4, 4), None),
    "HealthCmd": ((4, 5), "--health-cmd={}"),
    "HealthInterval": ((4, 5), "--health-interval={}"),
    "HealthTimeout": ((4, 5), "--health-timeout={}"),
    "HealthRetries": ((4, 5), "--health-retries={}"),
    "HealthOnFailure": ((4, 5), "--health-on-failure={}"),
    "HealthStartupCmd": ((4, 5), "--health-startup-cmd={}"),
    "HealthStartupInterval": ((4, 5), "--health-startup-interval={}"),
    "HealthStartupTimeout": ((4, 5), "--health-startup-timeout={}"),
    "LogDriver": ((4, 5), "--log-driver={}"),
    "SecurityLabelDisable": ((4, 5), "--security-opt=label=disable"),
    "Pull": ((4, 6), "--pull={}"),
    "ShmSize": ((4, 7), "--shm-size={}"),
    "Ulimit": ((4, 7), "--ulimit={}"),
    "Notify": ((5, 0), "--sdnotify={}"),
}
#: Keys that Quadlet splits into words; it takes the values of all others verbatim.
_SPLIT = ("Exec", "Environment", "Label")


def parse_version(text: str | None) -> Version:
    """Return major and minor of a Podman version; an unknown version counts as the newest.

    Raise StackctlError (exit 6) below 4.4, which has no Quadlet.
    """
    if text is None:
        return NEWEST
    match = re.match(r"(\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else NEWEST
    if version < OLDEST:
        raise StackctlError(
            f"Podman {text} has no Quadlet, which stackctl needs",
            hint=f"{INSTALL_PODMAN} (Debian 13, Ubuntu 24.04, Fedora have it)",
            exit_code=ExitCode.HOST,
        )
    return version


class Keys:
    """Writer of keys of a [Container] section for one Podman version.

    Keys that this version lacks become arguments, written by ``podman_args`` at the section's end.
    """

    def __init__(self, version: Version) -> None:
        self.version = version
        self._arguments: list[str] = []

    def key(self, name: str, *values: str) -> str:
        """Return a line ``Name=value`` and its newline; empty when it became a podman argument."""
        first, argument = _KEYS[name]
        if self.version >= first:
            text = quoting.quote_words(values) if name in _SPLIT else quoting.quote_raw(values[0])
            return f"{name}={text}\n"
        if argument is None:
            raise StackctlError(f"this Podman has no Quadlet key {name}", exit_code=ExitCode.HOST)
        self.argument(argument.format(values[0]))
        return ""

    def argument(self, text: str) -> str:
        """Collect an argument for ``podman run`` that no key of any version expresses."""
        self._arguments.append(text)
        return ""

    def podman_args(self) -> str:
        """Return the collected arguments, one a line. Quadlet puts them last, before the image."""
        return "".join(f"PodmanArgs={quoting.quote_words([text])}\n" for text in self._arguments)
