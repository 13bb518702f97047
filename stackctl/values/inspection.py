"""The inspected state of a running stack: from the kernel, systemd, Podman and the engine itself.

Unknown is None or an empty tuple; ``Inspection.missing`` has the reasons. No value holds a secret:
only planned environment variables are kept with their values.
"""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import EngineFact
from stackctl.values.result import Result

PageKind = Literal["model", "anonymous", "shared", "file"]
SocketOwner = Literal["engine", "door", "other"]


#: The part that differs from the deployed state: the unit files, the front door's unit, systemd's
#: settings of the unit, or the arguments of the running engine.
DriftCode = Literal["unit", "door", "systemd", "arguments"]


class Drift(Value, frozen=True, kw_only=True):
    """One difference from the deployed state; ``text`` is one line for display."""

    code: DriftCode
    text: str


class NodeBytes(Value, frozen=True, kw_only=True):
    """Bytes on one NUMA node."""

    node: int
    bytes: int


class Pages(Value, frozen=True, kw_only=True):
    """Pages of one kind under one memory policy, as the kernel writes it ("interleave:0-1")."""

    kind: PageKind
    policy: str
    nodes: tuple[NodeBytes, ...]


class EngineThread(Value, frozen=True, kw_only=True):
    """One thread, sampled over some time.

    ``computed_ns`` is the time that it ran, ``waited_ns`` the time that it was ready without a CPU.
    """

    process: int
    id: int
    cpus: CpuList | None = None
    computed_ns: int | None = None
    waited_ns: int | None = None


class EngineProcess(Value, frozen=True, kw_only=True):
    """One process of the engine.

    ``own_bytes`` is memory without a file, shared memory counted proportionally (Pss);
    ``file_bytes`` are the resident pages of files.
    """

    id: int
    command: str
    own_bytes: int | None = None
    file_bytes: int | None = None
    huge_bytes: int | None = None
    locked_bytes: int | None = None
    pages: tuple[Pages, ...] = ()


class ListeningSocket(Value, frozen=True, kw_only=True):
    """A listening TCP socket, or a bound UDP socket; ``process`` is a text for display."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    owner: SocketOwner
    process: str


class FileState(Value, frozen=True, kw_only=True):
    """The file behind a path. Times are in seconds since 1970.

    ``content_changed`` is the time of the last change of the content (mtime), ``changed`` that of
    any change (ctime).
    """

    device: int
    inode: int
    bytes: int
    content_changed: float
    changed: float


class ObservedModelFile(Value, frozen=True, kw_only=True):
    """A file of the model.

    ``now`` is the file behind the path on the host, ``engine`` the file behind it in the engine's
    container; None: missing or unreadable. ``deleted``: the engine maps a file that was deleted.
    """

    path: str
    planned_bytes: int
    now: FileState | None = None
    engine: FileState | None = None
    deleted: bool = False


class Neighbour(Value, frozen=True, kw_only=True):
    """Another busy process, with the CPUs that it may use.

    ``share`` is its CPU time divided by the sampled time; ``wanted`` also counts the time that it
    waited for a CPU. ``pinned``: it may use CPUs of the plan only, and the machine has others.
    """

    pid: int
    command: str
    share: float
    wanted: float
    cpus: CpuList
    pinned: bool


class GpuUse(Value, frozen=True, kw_only=True):
    """GPU memory of a process of the engine; None if the driver does not report the size."""

    gpu: int
    pid: int
    memory_bytes: int | None = None


class ObservedProxy(Value, frozen=True, kw_only=True):
    """The state of the front door's backend, and the port that it sends requests to."""

    state: str
    port: int | None = None


class Inspection(Value, frozen=True, kw_only=True):
    """The inspected state of one running generation.

    ``environment`` holds NAME=VALUE of planned variables; ``unplanned`` the names of variables that
    the engine reads and that neither the plan nor the image sets. ``online`` (the machine's CPUs),
    ``mems`` and ``cpuset_*`` are CPU or node lists. ``started`` is in seconds since 1970.
    ``watched`` describes the engine's work while threads and neighbours were sampled, for
    ``watched_s`` seconds. ``report`` holds facts that it reports over HTTP, ``log`` facts from the
    log of its start. ``missing`` holds pairs of an unknown fact and the reason.
    """

    pid: int
    started: float | None = None
    argv: tuple[str, ...] | None = None
    environment: tuple[str, ...] | None = None
    unplanned: tuple[str, ...] = ()
    by_unit: bool | None = None
    drift: tuple[Drift, ...] = ()
    processes: tuple[EngineProcess, ...] = ()
    threads: tuple[EngineThread, ...] = ()
    watched: str | None = None
    watched_s: float | None = None
    online: CpuList | None = None
    mems: CpuList | None = None
    cpuset_cpus: CpuList | None = None
    cpuset_mems: CpuList | None = None
    cpuset_controller: bool | None = None
    memlock_bytes: int | None = None
    hugepages: str | None = None
    listening: tuple[ListeningSocket, ...] | None = None
    files: tuple[ObservedModelFile, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    gpus: tuple[GpuUse, ...] | None = None
    image_id: str | None = None
    restarts: int | None = None
    model: Result | None = None
    report: tuple[EngineFact, ...] = ()
    log: tuple[EngineFact, ...] = ()
    door: ObservedProxy | None = None
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def first_drift(self) -> str | None:
        """Return the first difference from the deployed state; None if nothing differs."""
        return self.drift[0].text if self.drift else None

    def reason_missing(self, what: str) -> str:
        """Return the reason why a fact is unknown."""
        return dict(self.missing).get(what, "it does not tell")
