"""The facts that requirements check, as plain values; probe/ and provision/ read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stackctl.values.host import Host, Limits, Tools

Scope = Literal["user", "system"]


@dataclass(frozen=True)
class ProbeUser:
    """The user that the probe is for."""

    uid: int | None
    name: str | None


@dataclass(frozen=True)
class ToolsProbe:
    """The tools of a machine, with details that only requirements need."""

    tools: Tools
    user: ProbeUser
    #: The reason why podman gave no version; None if it gave one.
    podman_error: str | None
    podman_absent: bool
    #: True if systemd runs Quadlet for this scope; None on a recording that does not show it.
    generator_runs: bool | None
    #: True if systemd runs the machine, whatever the scope; None on a recording as above.
    booted: bool | None
    #: True if ``cgroup_controllers`` was read; otherwise its empty list means unknown.
    controllers_known: bool
    #: ID and ID_LIKE of os-release: the distribution, then similar ones. ``release``: VERSION_ID.
    families: tuple[str, ...]
    release: str | None
    #: Commands whose output a recording lacks.
    unrecorded: tuple[str, ...]


@dataclass(frozen=True)
class LaunchFacts:
    """The facts of one probe from which the problems of a launch follow."""

    live: bool
    scope: Scope
    probed: ToolsProbe
    limits: Limits
    #: True if the system manager can give any limit to its services; None if unknown.
    may_raise: bool | None
    nodes: int
    #: The highest limit of locked memory that services of the system can have, in bytes.
    memlock_reachable: int | None = None
    #: The paths of installed drop-ins.
    drop_ins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StackNeeds:
    """The needs of the chosen profiles; the defaults cover every stack."""

    gpu: bool = True
    memlock: bool = True
    cpuset: bool = True
    #: Items that the user named. They are fulfilled even if they have no effect yet.
    named: frozenset[str] = frozenset()
    #: Bytes that the engine locks, if one stack is checked; None if it locks none.
    memlock_bytes: int | None = None
    #: The model is quantised to nvfp4; None: unknown.
    nvfp4: bool | None = None
    #: The CUDA of the engine's image; None: unknown.
    cuda: str | None = None


@dataclass(frozen=True)
class ServiceUser:
    """The user who runs rootless stacks; ``uid`` is None if the account does not exist yet."""

    name: str
    uid: int | None = None
    home: str | None = None
    lingers: bool = False
    running: bool = False
    #: The hard limit in bytes of the running manager, and that of the next one by its unit.
    memlock_bytes: int | None = None
    memlock_next: int | None = None
    controllers: tuple[str, ...] = ()
    controllers_next: tuple[str, ...] = ()
    #: True if the unit's files have changed since systemd read them.
    stale: bool = False
    guarded: bool = False


@dataclass(frozen=True)
class SettingValue:
    """The value of a file of the kernel; ``writable`` is True if root can write it."""

    value: str
    writable: bool


@dataclass(frozen=True)
class ForeignSetting:
    """A line that stackctl did not write, for a value that stackctl would set.

    ``key`` is the name of a sysctl or a variable, a directive of systemd, or the file that
    systemd-tmpfiles writes. ``number`` is that of the line, or 0 if the whole file counts.
    """

    path: str
    number: int
    key: str
    value: str

    @property
    def name(self) -> str:
        """Return the file's name without its folder; files are read in the order of their names."""
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        """Return the place as PATH:LINE, or PATH if the whole file counts."""
        return f"{self.path}:{self.number}" if self.number else self.path

    @property
    def local(self) -> bool:
        """Return True if the file is in /etc or /run, so not from the distribution."""
        return self.path.startswith(("/etc/", "/run/"))


@dataclass(frozen=True)
class MachineFacts:
    """All facts that provisioning needs.

    ``files`` has the text at each path of a shipped file, or None if no file is there.
    """

    host: Host
    families: tuple[str, ...] = ()
    release: str | None = None
    user: ServiceUser | None = None
    may_raise: bool | None = None
    #: The highest limit of a user's manager: process 1's own if that process cannot raise limits.
    memlock_reachable: int | None = None
    root_controllers: tuple[str, ...] = ()
    files: Mapping[str, str | None] = field(default_factory=dict)
    #: The text that stackctl last wrote to each of these files, by path.
    written: Mapping[str, str] = field(default_factory=dict)
    shipped: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[ForeignSetting, ...] = ()
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    #: Versions of installed packages by name; None if the machine has no dpkg.
    packages: Mapping[str, str] | None = None
    held: frozenset[str] = frozenset()
    #: If packages are missing: all packages that their installation would bring. ``toolkit``: the
    #: version of the NVIDIA Container Toolkit that the package sources have. ``podman_candidate``:
    #: their version of podman, if podman is not installed.
    simulated: tuple[str, ...] = ()
    podman_candidate: str | None = None
    toolkit: str | None = None
    subuid: str = ""
    subgid: str = ""
    swap: bool = False
    folders: frozenset[str] = frozenset()
    units: frozenset[str] = frozenset()
    enabled: frozenset[str] = frozenset()
    guarded: bool = False
    #: The stackctl in root's search path, and the way by which other users can change it; None: no.
    program: str | None = None
    program_weakness: str | None = None
    #: True if the weakness is in the copy itself, so that a new copy is without it.
    program_replaceable: bool = False
    #: True if it is the copy that provisioning installs; and if that copy has this version.
    program_ours: bool = False
    program_current: bool = True
    python_weakness: str | None = None
