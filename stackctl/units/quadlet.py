"""The oldest usable Podman, and the Quadlet keys that newer versions brought.

Quadlet does not ignore a key unknown to its version: it drops the whole unit. Versions
were read from Podman's sources at each tag and from running the generators of 4.6.2 to 5.8.2.
"""

from __future__ import annotations

import re

from stackctl.errors import ExitCode, StackctlError
from stackctl.units import quoting

Version = tuple[int, int]
NEWEST: Version = (99, 0)
#: The only place with the oldest usable version: Quadlet came with Podman 4.4 but reads no
#: subfolders before 4.7, and podman has --sdnotify=healthy from 4.7 on (its release notes).
OLDEST: Version = (4, 7)
OLDEST_TEXT = ".".join(map(str, OLDEST))
WHY_OLDEST = f"Quadlet reads subfolders and podman has --sdnotify=healthy from {OLDEST_TEXT} on"
INSTALL_PODMAN = f"install Podman {OLDEST_TEXT} or newer"
#: provision knows whether this machine's packages have such a version.
PODMAN_REMEDY = f"{INSTALL_PODMAN}: stackctl provision --only podman"

#: Keys that every usable version has.
_KEYS = frozenset({
    "Image", "ContainerName", "Exec", "Volume", "AddDevice", "Network", "ReadOnly",
    "NoNewPrivileges", "DropCapability", "Environment", "Label", "HealthCmd", "HealthInterval",
    "HealthTimeout", "HealthRetries", "HealthOnFailure", "HealthStartupCmd",
    "HealthStartupInterval", "HealthStartupTimeout", "LogDriver", "SecurityLabelDisable", "Pull",
    "ShmSize", "Ulimit",
})  # fmt: skip
#: Key: (first version, argument for older ones; ``{}`` is the value). Before 5.0, Notify only
#: takes true and false.
_LATER_KEYS: dict[str, tuple[Version, str]] = {"Notify": ((5, 0), "--sdnotify={}")}
#: Keys that Quadlet splits into words; it takes the values of all others verbatim.
_SPLIT = ("Exec", "Environment", "Label")


def parse_version(text: str | None) -> Version:
    """Return major and minor of a Podman version; an unknown version counts as the newest.

    Raise StackctlError (exit 6) below the oldest usable version.
    """
    if text is None:
        return NEWEST
    match = re.match(r"(\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else NEWEST
    if version < OLDEST:
        raise StackctlError(
            f"Podman {text} is too old: {WHY_OLDEST}",
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
        if name not in _KEYS:
            first, argument = _LATER_KEYS[name]
            if self.version < first:
                return self.argument(argument.format(values[0]))
        text = quoting.quote_words(values) if name in _SPLIT else quoting.quote_raw(values[0])
        return f"{name}={text}\n"

    def argument(self, text: str) -> str:
        """Collect an argument for ``podman run`` that no key of any version expresses."""
        self._arguments.append(text)
        return ""

    def podman_args(self) -> str:
        """Return the collected arguments, one a line. Quadlet puts them last, before the image."""
        return "".join(f"PodmanArgs={quoting.quote_words([text])}\n" for text in self._arguments)
