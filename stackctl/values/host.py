"""The facts of a machine: the document ``stackctl.host/1``.

Unknown is None, or an empty tuple for a list; never 0 or an empty text. The CPU list of a
memory-only NUMA node is an exception: it is really empty. CPU lists are the kernel's ("0-13,16").
"""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.cpu_list import CpuList

#: The value of a limit that is "unlimited". It is RLIM_INFINITY, so comparisons need no special
#: case.
UNLIMITED = 2**64 - 1


#: The subject of a problem. Code compares these codes, so the texts may be reworded freely.
ProblemCode = Literal[
    "recording-incomplete",
    "podman-missing",
    "podman-no-answer",
    "podman-too-old",
    "quadlet-missing",
    "systemd-not-running",
    "user-manager-not-running",
    "cgroup-v1",
    "linger-off",
    "cpuset-missing",
    "cpuset-not-delegated",
    "memlock-unknown",
    "memlock-limited",
    "cpus-unknown",
    "cores-unknown",
    "usable-cpus-unknown",
    "memory-size-unknown",
    "numa-unknown",
    "numa-overlap",
    "numa-memory-unknown",
    "gpu-memory-unknown",
    "file-damaged",
]
#: The reasons why Podman cannot use a CDI file.
CdiProblemCode = Literal[
    "unreadable",
    "unparsable",
    "no-kind",
    "no-devices",
    "duplicate-device",
    "additional-gids",
    "newer-cdi",
    "other-driver",
    "missing-file",
]


class L3(Value, frozen=True, kw_only=True):
    """One L3 cache and the CPUs that share it."""

    id: int
    bytes: int | None = None
    cpus: CpuList


class NumaNode(Value, frozen=True, kw_only=True):
    """One NUMA node; ``distances`` are in the order of the node list (10 is local).

    ``cpus`` is empty for a memory-only node, ``memory_bytes`` 0 for one without memory.
    """

    id: int
    cpus: CpuList = CpuList()
    memory_bytes: int | None = None
    distances: tuple[int, ...] = ()


class CoreKind(Value, frozen=True, kw_only=True):
    """The cores of one kind on a hybrid processor.

    ``capacity`` is the relative speed (1024: the fastest kind).
    """

    name: str
    cpus: CpuList
    capacity: int | None = None


class Cpu(Value, frozen=True, kw_only=True):
    """Topology of the online processors; ``allowed`` lists the CPUs that this process may use.

    ``siblings`` lists the CPUs of each physical core, so that one CPU of each core can be chosen.
    ``kinds`` lists the fastest kind first; it is empty unless cores differ. ``quota_cpus`` is the
    CPU quota of a cgroup, as a number of CPUs (None: no limit).
    """

    model: str | None = None
    vendor: str | None = None
    architecture: str | None = None
    sockets: int | None = None
    cores: int | None = None
    threads: int | None = None
    threads_per_core: int | None = None
    online: CpuList | None = None
    allowed: CpuList | None = None
    siblings: tuple[CpuList, ...] = ()
    isa: tuple[str, ...] = ()
    smt: bool | None = None
    l3: tuple[L3, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    governor: str | None = None
    dies: int | None = None
    offline: CpuList | None = None
    kinds: tuple[CoreKind, ...] = ()
    quota_cpus: float | None = None
    governor_driver: str | None = None


class Bandwidth(Value, frozen=True, kw_only=True):
    """Memory bandwidth in bytes per second."""

    theoretical: float | None = None
    measured: float | None = None


class HugePages(Value, frozen=True, kw_only=True):
    """Explicit huge pages of one size."""

    bytes: int
    total: int
    free: int


class GpuProcess(Value, frozen=True, kw_only=True):
    """A process that holds memory of a GPU."""

    pid: int
    command: str | None = None
    memory_bytes: int | None = None


class Memory(Value, frozen=True, kw_only=True):
    """Main memory. ``limit_bytes`` is a cgroup's limit on this process, if there is one.

    ``channels`` counts the memory channels of all sockets. ``bandwidth_source`` is the source of
    the theoretical bandwidth: "dmi" or "table: FAMILY".
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    transparent_hugepages: str | None = None
    channels: int | None = None
    speed_mt_s: int | None = None
    bandwidth_bytes_s: Bandwidth = Bandwidth()
    bandwidth_source: str | None = None
    hugepages_free: tuple[HugePages, ...] = ()


class Gpu(Value, frozen=True, kw_only=True):
    """One GPU as its driver reports it.

    ``cdi`` is its CDI device name, ``cuda`` the newest CUDA version that the driver supports,
    ``pcie`` the link, such as "gen5 x16".
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    memory_bytes: int | None = None
    compute_capability: str | None = None
    driver: str | None = None
    pci: str | None = None
    numa_node: int | None = None
    cdi: str | None = None
    free_bytes: int | None = None
    bandwidth_bytes_s: float | None = None
    cuda: str | None = None
    power_limit_w: int | None = None
    pcie: str | None = None
    processes: tuple[GpuProcess, ...] = ()


class CdiSpec(Value, frozen=True, kw_only=True):
    """One CDI file: its devices, its version, and its first problem (None: no problem).

    ``code`` is the kind of the problem; it is None in documents of older versions.
    """

    path: str
    version: str | None = None
    devices: tuple[str, ...] = ()
    problem: str | None = None
    code: CdiProblemCode | None = None


class Tools(Value, frozen=True, kw_only=True):
    """Programs and kernel interfaces that a launch needs, for one scope.

    ``cgroup_controllers`` are the controllers that a unit of this scope can use: those of the root
    cgroup for system units, those delegated to the user's service manager for user units.
    """

    os: str | None = None
    kernel: str | None = None
    podman: str | None = None
    quadlet_generator: str | None = None
    systemd: str | None = None
    systemd_running: bool | None = None
    cgroup_version: Literal[1, 2] | None = None
    cgroup_controllers: tuple[str, ...] = ()
    linger: bool | None = None
    numa_balancing: bool | None = None
    swappiness: int | None = None
    selinux: Literal["enforcing", "permissive", "disabled"] | None = None
    #: SELinux's boolean container_use_devices.
    selinux_devices: bool | None = None
    #: Podman confines root's containers with AppArmor. ``apparmor_profiles`` are the loaded
    #: profiles of containers, and crun's.
    apparmor: bool | None = None
    apparmor_profiles: tuple[str, ...] = ()
    cdi: tuple[CdiSpec, ...] = ()


class Storage(Value, frozen=True, kw_only=True):
    """The folder of the models: its file system, its free space, and its read speed.

    The read speed is in bytes per second; None if it was not measured.
    """

    path: str
    filesystem: str | None = None
    free_bytes: int | None = None
    read_bytes_s: float | None = None


class Limits(Value, frozen=True, kw_only=True):
    """Hard resource limits that a service of this scope can reach; UNLIMITED: there is no limit."""

    memlock_bytes: int | None = None
    nofile: int | None = None


class Problem(Value, frozen=True, kw_only=True):
    """An obstacle or an unreadable fact, its cause, and the command that fixes it.

    ``code`` is None in documents of older versions, which did not write it.
    """

    what: str
    why: str
    fix: str | None = None
    code: ProblemCode | None = None


class Host(Value, frozen=True, kw_only=True):
    """All facts of one machine, read in one scope."""

    schema: Literal["stackctl.host/1"] = "stackctl.host/1"
    scope: Literal["user", "system"] | None = None
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    gpus: tuple[Gpu, ...] = ()
    tools: Tools = Tools()
    limits: Limits = Limits()
    storage: Storage | None = None
    problems: tuple[Problem, ...] = ()
