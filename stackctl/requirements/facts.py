"""The facts that requirements judge, as plain values; probe/ and provision/ read them."""

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
    """The tools of a machine, with details that only the list of problems needs."""

    tools: Tools
    who: ProbeUser
    #: Why podman gave no version; None when it did.
    podman_error: str | None
    podman_absent: bool
    #: systemd runs Quadlet for this scope; None on a recording that does not show it.
    generator_runs: bool | None
    #: systemd runs the machine, whatever the scope.
    booted: bool | None
    #: ``cgroup_controllers`` was read: when it was not, an empty list means unknown.
    controllers_known: bool
    #: Identifiers of the distribution and of those it is like; and its version.
    families: tuple[str, ...]
    release: str | None
    #: Commands that a recorded machine does not hold.
    unrecorded: tuple[str, ...]


@dataclass(frozen=True)
class LaunchFacts:
    """The facts of one probe that decide which problems a launch would meet."""

    live: bool
    scope: Scope
    seen: ToolsProbe
    limits: Limits
    #: Services of the system manager can be given any limit.
    may_raise: bool | None
    nodes: int
    #: The limit of locked memory that process 1 itself has, and so can hand on.
    memlock_reachable: int | None = None
    #: Drop-ins of user managers that are installed.
    drop_ins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StackNeeds:
    """The needs of the chosen profiles; the defaults are those of all stacks there could be."""

    gpu: bool = True
    memlock: bool = True
    cpuset: bool = True
    #: Items asked for by name: done also where they have no effect yet.
    named: frozenset[str] = frozenset()
    #: Memory that the engine locks, where one stack is judged.
    memlock_bytes: int | None = None
    #: The model is quantised to nvfp4; None: unknown.
    nvfp4: bool | None = None
    #: The CUDA of the engine's image; None: unknown.
    cuda: str | None = None


@dataclass(frozen=True)
class User:
    """The user who runs rootless stacks. ``uid`` is None while the account does not exist."""

    name: str
    uid: int | None = None
    home: str | None = None
    lingers: bool = False
    running: bool = False
    #: The hard limit of the running manager, and that of the next one by its unit.
    memlock_bytes: int | None = None
    memlock_next: int | None = None
    controllers: tuple[str, ...] = ()
    controllers_next: tuple[str, ...] = ()
    #: systemd has not read the unit's files since they changed.
    stale: bool = False
    guarded: bool = False


@dataclass(frozen=True)
class Setting:
    """The value of a file of the kernel; ``writable``: root could write it."""

    value: str
    writable: bool


@dataclass(frozen=True)
class ForeignSetting:
    """A line that somebody else wrote and that sets a value which stackctl would set.

    ``key`` is the name of a sysctl, a directive of systemd, or the file that systemd-tmpfiles
    writes. ``number`` is 0 where a whole file counts.
    """

    path: str
    number: int
    key: str
    value: str

    @property
    def name(self) -> str:
        """Return the file's name without its folder: it decides which file comes last."""
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        """Return the place as people write it: PATH:LINE."""
        return f"{self.path}:{self.number}" if self.number else self.path

    @property
    def local(self) -> bool:
        """Return True when a person or program of this machine wrote it, not the distribution."""
        return self.path.startswith(("/etc/", "/run/"))


@dataclass(frozen=True)
class MachineFacts:
    """All facts that provisioning needs. ``files`` holds None where there is none."""

    host: Host
    families: tuple[str, ...] = ()
    release: str | None = None
    user: User | None = None
    may_raise: bool | None = None
    #: The limit a user's manager could get: process 1's own where it may raise none.
    memlock_reachable: int | None = None
    root_controllers: tuple[str, ...] = ()
    files: Mapping[str, str | None] = field(default_factory=dict)
    #: The texts that stackctl wrote to those files last, by path.
    written: Mapping[str, str] = field(default_factory=dict)
    shipped: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[ForeignSetting, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    #: Version by name of the packages that dpkg has installed; None: no dpkg here.
    packages: Mapping[str, str] | None = None
    held: frozenset[str] = frozenset()
    #: For missing packages: all that would be installed, and the version of the toolkit.
    simulated: tuple[str, ...] = ()
    toolkit: str | None = None
    subuid: str = ""
    subgid: str = ""
    swap: bool = False
    folders: frozenset[str] = frozenset()
    units: frozenset[str] = frozenset()
    enabled: frozenset[str] = frozenset()
    guarded: bool = False
    #: The path of stackctl in root's search path, and how others could change it, if they can.
    program: str | None = None
    program_weakness: str | None = None
    #: It is the copy that provisioning installs, and of this version.
    program_ours: bool = False
    program_current: bool = True
    python_weakness: str | None = None
