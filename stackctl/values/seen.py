"""What was seen of a running stack: from the kernel, systemd, Podman and the engine itself.

Unknown is None or an empty tuple; ``Missing`` then says why. Nothing here holds a secret: of the
environment only the values of planned variables are kept.
"""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.cpulist import CpuList
from stackctl.values.generation import Fact
from stackctl.values.result import Result

Kind = Literal["model", "anonymous", "shared", "file"]
Owner = Literal["engine", "door", "other"]


#: What differs from the deployed state: the unit's files, the front door's unit, systemd's settings
#: of the unit, or the arguments of the running engine.
DriftCode = Literal["unit", "door", "systemd", "arguments"]


class Drift(Value, frozen=True, kw_only=True):
    """One thing that is not as it was deployed; ``text`` is one line for people."""

    code: DriftCode
    text: str


class Missing(Value, frozen=True, kw_only=True):
    """What could not be read, and why."""

    what: str
    why: str


class NodeBytes(Value, frozen=True, kw_only=True):
    """Bytes on one NUMA node."""

    node: int
    bytes: int


class Pages(Value, frozen=True, kw_only=True):
    """Pages of one kind under one memory policy, in the kernel's words ("interleave:0-1")."""

    kind: Kind
    policy: str
    nodes: tuple[NodeBytes, ...]


class Thread(Value, frozen=True, kw_only=True):
    """One thread. ``computed_ns`` and ``waited_ns`` are how long it ran, and how long it could have
    run and had no CPU, while it was watched."""

    process: int
    id: int
    cpus: CpuList | None = None
    computed_ns: int | None = None
    waited_ns: int | None = None


class Process(Value, frozen=True, kw_only=True):
    """One process of the engine. ``own_bytes`` is memory of no file, of which what processes share
    counts by shares (Pss); ``file_bytes`` are the pages of files that it has mapped."""

    id: int
    command: str
    own_bytes: int | None = None
    file_bytes: int | None = None
    huge_bytes: int | None = None
    locked_bytes: int | None = None
    pages: tuple[Pages, ...] = ()


class Listening(Value, frozen=True, kw_only=True):
    """A TCP socket that listens, or a UDP socket that is bound; ``process`` is for people."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    owner: Owner
    process: str


class FileState(Value, frozen=True, kw_only=True):
    """Which file a path leads to, and when it was changed (seconds since 1970): its content, and
    anything of it."""

    device: int
    inode: int
    bytes: int
    content_changed: float
    changed: float


class ModelFileSeen(Value, frozen=True, kw_only=True):
    """A file of the model: what the path leads to now, and what the engine has there (None: it
    cannot be seen). ``deleted``: the engine maps a file that has no name any more."""

    path: str
    planned_bytes: int
    now: FileState | None = None
    engine: FileState | None = None
    deleted: bool = False


class Neighbour(Value, frozen=True, kw_only=True):
    """Another busy process, and where it may run: of one CPU's time the share that it got while it
    was watched, and what it ``wanted``, so with the time that it waited for a CPU.

    ``pinned``: only on CPUs of the plan, though the machine has others.
    """

    pid: int
    command: str
    share: float
    wanted: float
    cpus: CpuList
    pinned: bool


class GpuUse(Value, frozen=True, kw_only=True):
    """GPU memory that a process of the engine holds; None where the driver does not tell."""

    gpu: int
    pid: int
    memory_bytes: int | None = None


class DoorSeen(Value, frozen=True, kw_only=True):
    """What the front door itself says: whether requests pass, and to which port."""

    state: str
    port: int | None = None


class Seen(Value, frozen=True, kw_only=True):
    """All that was seen of one running generation.

    ``environment`` holds NAME=VALUE of planned variables, ``unplanned`` names only, of variables
    that engines read and neither the plan nor the image sets. ``online`` (the machine's CPUs),
    ``mems`` and ``cpuset_*`` are CPU or node lists. ``started`` is in seconds since 1970.
    ``watched`` says what the engine did while its threads and its neighbours were watched, for
    ``watched_s``. ``report`` is what it says over HTTP now, ``log`` what it said when it started.
    """

    pid: int
    started: float | None = None
    argv: tuple[str, ...] | None = None
    environment: tuple[str, ...] | None = None
    unplanned: tuple[str, ...] = ()
    by_unit: bool | None = None
    drift: tuple[Drift, ...] = ()
    processes: tuple[Process, ...] = ()
    threads: tuple[Thread, ...] = ()
    watched: str | None = None
    watched_s: float | None = None
    online: CpuList | None = None
    mems: CpuList | None = None
    cpuset_cpus: CpuList | None = None
    cpuset_mems: CpuList | None = None
    cpuset_controller: bool | None = None
    memlock_bytes: int | None = None
    hugepages: str | None = None
    listening: tuple[Listening, ...] | None = None
    files: tuple[ModelFileSeen, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    gpus: tuple[GpuUse, ...] | None = None
    image_id: str | None = None
    restarts: int | None = None
    model: Result | None = None
    report: tuple[Fact, ...] = ()
    log: tuple[Fact, ...] = ()
    door: DoorSeen | None = None
    missing: tuple[Missing, ...] = ()

    @property
    def first_drift(self) -> str | None:
        """The first thing that is not as it was deployed; None if nothing differs."""
        return self.drift[0].text if self.drift else None

    def why_missing(self, what: str) -> str:
        """Why something is not known."""
        return next((one.why for one in self.missing if one.what == what), "it does not tell")
