"""Inspection of a running stack, through the kernel, systemd, Podman and the engine itself.

``verify_stack`` compares its result with the plan, by the rules in ``stackctl.diagnose``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from stackctl.deploy import proxy
from stackctl.deploy.context import Context
from stackctl.diagnose.verify_process import verify_inspection
from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import podman, ports
from stackctl.machine.machine import Machine
from stackctl.machine.systemd import UnitState
from stackctl.observe import engine_snapshot, procfs
from stackctl.observe.drift import find_drift
from stackctl.observe.thread_sampling import sample_threads
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.nvml import Nvml
from stackctl.units.proxy_unit import proxy_container
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import EngineFact, Generation
from stackctl.values.host import UNLIMITED
from stackctl.values.inspection import (
    GpuUse,
    Inspection,
    ListeningSocket,
    ObservedModelFile,
    ObservedProxy,
    SocketOwner,
)
from stackctl.values.result import VerifyReport

_LOG_LINES = 3000
#: The first log lines of a start are a little older than its process.
_EARLIER_S = 2.0
_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
#: Far more than the open files of an engine, which are a few hundred.
_MOST_SOCKETS = 10_000


#: The facts that could not be read, each with the first reason.
Unread = dict[str, str]


def verify_stack(context: Context, generation: Generation) -> VerifyReport:
    """Compare a running stack with its generation.

    Raises:
        StackctlError: exit 3 if the stack does not run or ended during the inspection.
    """
    stack, name = generation.stack, generation.units.container
    unit = context.systemd.state(generation.units.service)
    state = unit.active or "unknown"
    container = podman.inspect_containers((name,)).get(name)
    if state != "active" or container is None or not container.pid:
        raise StackctlError(
            f"{stack} is not running ({state if state != 'active' else 'no container'})",
            hint=f"stackctl status {stack}; stackctl restart {stack}",
            exit_code=ExitCode.NOT_RUNNING,
        )
    inspection = collect_inspection(context, generation, unit, container)
    now = procfs.read_stat(context.machine, container.pid)
    again = podman.inspect_containers((name,)).get(name)
    if now is None or again is None or again.pid != container.pid:
        # The inspection may have mixed two runs of the engine.
        raise engine_snapshot.ended_meanwhile(stack)
    return VerifyReport(
        stack=stack, generation=generation.number, results=verify_inspection(generation, inspection)
    )


def collect_inspection(
    context: Context, generation: Generation, unit: UnitState, container: podman.Container
) -> Inspection:
    """Inspect a generation whose container runs; this takes about a second.

    ``unit`` is the state of its service. The inspection sends a few short completions to the
    engine's own port.
    """
    machine, notes, pid, plan = context.machine, Unread(), container.pid, generation.plan
    stats = procfs.processes(machine)
    engine_pids = procfs.descendants(stats, pid)
    door_pids = _door_pids(generation, stats)
    seen = sample_threads(machine, plan, engine_pids, frozenset((*engine_pids, *door_pids)))
    is_model = procfs.is_below([inside for _, inside in model_mounts.model_mounts(plan.model)])
    environment, unplanned = _environment(machine, generation, container, notes)
    cpuset_cpus, cpuset_mems, controller = read_cpuset(machine, pid)
    started = _started(machine, stats.get(pid))
    status = procfs.parse_status(machine.read(f"/proc/{pid}/status"))
    argv = procfs.parse_nul_list(machine.read(f"/proc/{pid}/cmdline"))
    processes = tuple(procfs.process_memory(machine, stats[one], is_model) for one in engine_pids)
    for what, name, found in (
        ("argv", "cmdline", argv is not None),
        ("numa", "numa_maps", any(one.pages for one in processes)),
        ("memory", "smaps_rollup", any(one.own_bytes is not None for one in processes)),
        ("threads", "task", bool(seen.threads)),
    ):
        if not found:
            notes[what] = _why(machine, pid, name)
    url = endpoint.base_url(plan.engine_listen_port)
    return Inspection(
        pid=pid,
        started=started,
        argv=argv,
        environment=environment,
        unplanned=unplanned,
        by_unit=_by_unit(machine, generation, stats.get(pid), unit.main_pid),
        drift=find_drift(context, generation, unit, 0),
        processes=processes,
        threads=seen.threads,
        watched=seen.did,
        watched_s=seen.seconds,
        online=_cpu_list(machine.read("/sys/devices/system/cpu/online")),
        mems=_cpu_list(status.get("Mems_allowed_list")),
        cpuset_cpus=_cpu_list(cpuset_cpus),
        cpuset_mems=_cpu_list(cpuset_mems),
        cpuset_controller=controller,
        memlock_bytes=parse_memlock(machine.read(f"/proc/{pid}/limits")),
        hugepages=_chosen(machine.read("/sys/kernel/mm/transparent_hugepage/enabled")),
        listening=service_sockets(machine, generation, pid, engine_pids, door_pids, notes),
        files=observed_model_files(machine, generation, pid, notes),
        neighbours=seen.neighbours,
        gpus=_gpus(machine, generation, engine_pids, notes),
        image_id=container.image_id or None,
        restarts=unit.restarts,
        model=endpoint.check_model_listed(url, plan.served_name),
        report=endpoint.read_reports(plan.engine_listen_port, find_engine(plan.engine).reports),
        log=_log(context, generation, started, notes),
        door=_door(context, generation, notes),
        missing=tuple(notes.items()),
    )


def _door_pids(generation: Generation, stats: Mapping[int, procfs.ProcessStat]) -> tuple[int, ...]:
    """Return the process IDs of the front door's container; empty without a front door."""
    if generation.door is None:
        return ()
    found = podman.inspect_containers((proxy_container(generation.stack),)).values()
    return tuple(pid for one in found if one.pid for pid in procfs.descendants(stats, one.pid))


def _why(machine: Machine, pid: int, name: str) -> str:
    """Return the reason why a file of a process could not be read."""
    if not machine.glob(f"/proc/{pid}"):
        return f"process {pid} has ended"
    return f"the kernel does not show /proc/{pid}/{name} to this user"


def _by_unit(
    machine: Machine, generation: Generation, stat: procfs.ProcessStat | None, main: int | None
) -> bool | None:
    """Return True if a process belongs to the unit; None if unknown.

    It does if it is the unit's main process (conmon) or a child of it, or is in the unit's cgroup.
    """
    if stat is None or main is None:
        return None
    group = machine.read(f"/proc/{stat.pid}/cgroup") or ""
    # systemd puts an underscore before a unit name that begins like a controller's file ("cpu.").
    inside = re.search(rf"/_?{re.escape(generation.units.service)}(/|$)", group, re.MULTILINE)
    return main in (stat.pid, stat.parent) or inside is not None


def _as_owner(machine: Machine, pid: int, *words: str) -> str | None:
    """Return the output of a command in the user namespace of this user's containers.

    An image with its own user runs under a subordinate ID. The kernel shows the environment and the
    open files of such a process only in that namespace (proc(5): the file's owner, and
    CAP_SYS_PTRACE over it). Return None if the process has ended or the command fails.
    """
    if not machine.glob(f"/proc/{pid}"):
        return None
    try:
        done = machine.run(("podman", "unshare", *words))
    except StackctlError:
        return None
    return done.stdout if done.status == 0 else None


def _started(machine: Machine, stat: procfs.ProcessStat | None) -> float | None:
    """Return the start of a process in seconds since 1970, rounded to 0.01 s, one tick."""
    uptime = (machine.read("/proc/uptime") or "").split()
    if stat is None or not uptime:
        return None
    return round(time.time() - (float(uptime[0]) - stat.start_ticks / procfs.TICKS), 2)


def _environment(
    machine: Machine, generation: Generation, container: podman.Container, notes: Unread
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return planned variables with their values, and the names of unplanned ones.

    The first is None if the environment cannot be read.
    """
    path = f"/proc/{container.pid}/environ"
    texts = procfs.parse_nul_list(
        machine.read(path) or _as_owner(machine, container.pid, "cat", path)
    )
    if texts is None:
        notes.setdefault("environment", _why(machine, container.pid, "environ"))
        return None, ()
    planned = {text.partition("=")[0] for text in generation.plan.environment}
    names = [text.partition("=")[0] for text in texts]
    ours = tuple(text for text in texts if text.partition("=")[0] in planned)
    # Other variables do not affect the engine.
    prefixes = find_engine(generation.plan.engine).environment_prefixes
    read = [n for n in names if n.startswith(prefixes) and n not in planned]
    known = podman.image_environment(generation.image_id) if read else ()
    return ours, tuple(sorted(name for name in read if name not in known))


def read_cpuset(machine: Machine, pid: int) -> tuple[str | None, str | None, bool | None]:
    """Return the CPUs and the nodes of a process's cpuset, and True if it has the controller.

    Each is None if it is unknown.
    """
    lines = (machine.read(f"/proc/{pid}/cgroup") or "").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    root = next((x for x in _CGROUPS if machine.read(f"{x}/cgroup.controllers") is not None), None)
    if path is None or root is None:
        return None, None, None
    folder = f"{root}{path.rstrip('/')}"
    controllers = machine.read(f"{folder}/cgroup.controllers")
    cpus, mems = (
        (machine.read(f"{folder}/cpuset.{name}.effective") or "").strip() or None
        for name in ("cpus", "mems")
    )
    return cpus, mems, None if controllers is None else "cpuset" in controllers.split()


def parse_memlock(limits: str | None) -> int | None:
    """Return the soft limit of locked memory in bytes, from the text of /proc/PID/limits.

    Return UNLIMITED if there is no limit, None if the text has none.
    """
    line = next((x for x in (limits or "").splitlines() if x.startswith("Max locked memory")), "")
    value = (line.removeprefix("Max locked memory").split() or [""])[0]
    return UNLIMITED if value == "unlimited" else int(value) if value.isdecimal() else None


def _cpu_list(text: str | None) -> CpuList | None:
    """Return a list in a file of the kernel's; None if the file is empty or missing."""
    return CpuList.parse(text) or None if text is not None else None


def _chosen(text: str | None) -> str | None:
    """Return the choice in a text such as ``always [madvise] never``; None without one."""
    return (text or "").partition("[")[2].partition("]")[0] or None


def service_sockets(
    machine: Machine,
    generation: Generation,
    pid: int,
    engine_pids: tuple[int, ...],
    door_pids: tuple[int, ...],
    notes: Unread,
) -> tuple[ListeningSocket, ...] | None:
    """Return the sockets of the engine and the front door, and foreign sockets on their ports.

    Return None if the sockets cannot be read.
    """
    sockets = ports.listening_sockets(machine, pid)
    if sockets is None:
        notes.setdefault("ports", _why(machine, pid, "net/tcp"))
        return None
    holders: dict[str, tuple[SocketOwner, str]] = {}
    owners: tuple[tuple[SocketOwner, tuple[int, ...]], ...] = (
        ("engine", engine_pids), ("door", door_pids),
    )  # fmt: skip
    for owner, pids in owners:
        for one in pids:
            folder = f"/proc/{one}/fd"
            links = [machine.read_link(path) for path in machine.glob(f"{folder}/*")]
            if not links:
                words = ("find", folder, "-type", "l", "-printf", "%l\\n")
                links = [*(_as_owner(machine, one, *words) or "").splitlines()]
            if not links:
                notes.setdefault("ports", _why(machine, one, "fd"))
                return None
            command = (machine.read(f"/proc/{one}/comm") or "").strip() or owner
            for link in links[:_MOST_SOCKETS]:
                if link is not None and link.startswith("socket:["):
                    holders.setdefault(link[8:-1], (owner, f"{command} (process {one})"))
    meant = {generation.plan.port, generation.plan.engine_listen_port}
    found = []
    for socket in sockets:
        if socket.inode not in holders:
            if socket.port not in meant or socket.protocol != "tcp":
                continue
            other = ports.socket_owner(machine, frozenset((socket.inode,)))
            holders[socket.inode] = ("other", str(other))
        owner, process = holders[socket.inode]
        found.append(
            ListeningSocket(
                protocol=socket.protocol,
                address=socket.address,
                port=socket.port,
                owner=owner,
                process=process,
            )
        )
    return tuple(dict.fromkeys(found))


def observed_model_files(
    machine: Machine, generation: Generation, pid: int, notes: Unread
) -> tuple[ObservedModelFile, ...]:
    """Return the files of the model, as seen on the host and in the engine's container."""
    model = generation.plan.model
    places = model_mounts.model_mounts(model)
    maps = machine.read(f"/proc/{pid}/maps") or ""
    gone = procfs.deleted_model_files(maps, procfs.is_below([inside for _, inside in places]))
    root = f"/proc/{pid}/root"
    if machine.file_state(root) is None:
        notes.setdefault("files", _why(machine, pid, "root"))
    found = []
    for file in model.files:
        inside = _inside(file.path, places)
        found.append(
            ObservedModelFile(
                path=file.path,
                planned_bytes=file.bytes,
                now=machine.file_state(file.path),
                engine=machine.file_state(root + inside) if inside is not None else None,
                deleted=inside in gone,
            )
        )
    return tuple(found)


def _inside(path: str, places: tuple[tuple[str, str], ...]) -> str | None:
    """Return a file's path in the container; None if no mount contains it."""
    for source, inside in places:
        if path == source:
            return inside
        if path.startswith(f"{source}/"):
            return inside + path[len(source) :]
    return None


def _gpus(
    machine: Machine, generation: Generation, engine_pids: tuple[int, ...], notes: Unread
) -> tuple[GpuUse, ...] | None:
    """Return the GPU memory of the engine's processes; None if unknown or no GPU is planned."""
    if not generation.plan.placement.gpus:
        return None
    library = Nvml(FactReader(machine))
    readings = library.readings()
    if readings is None:
        notes.setdefault("gpu", library.error or "the driver does not tell")
        return None
    if all(device.processes is None for device in readings.devices):
        notes.setdefault("gpu", "the driver does not tell which processes use the GPU")
        return None
    return tuple(
        GpuUse(gpu=index, pid=process.pid, memory_bytes=process.memory_bytes)
        for index, device in enumerate(readings.devices)
        for process in device.processes or ()
        if process.pid in engine_pids
    )


def _log(
    context: Context, generation: Generation, started: float | None, notes: Unread
) -> tuple[EngineFact, ...]:
    """Return the facts in the log of the engine's start, else the stored ones."""
    since = (started or time.time()) - _EARLIER_S
    try:
        lines = engine_snapshot.log_lines(context, generation, since, _LOG_LINES)
    except StackctlError as error:
        lines = []
        notes.setdefault("log", error.message)
    facts = find_engine(generation.plan.engine).facts_from_log(lines)
    if not lines:
        notes.setdefault("log", "the journal shows nothing of this start (or not to this user)")
    return facts or generation.outcome.report


def _door(context: Context, generation: Generation, notes: Unread) -> ObservedProxy | None:
    if generation.door is None:
        return None
    try:
        state, port = proxy.backend_state(context, generation.stack)
    except StackctlError as error:
        notes.setdefault("door", error.message)
        return None
    return ObservedProxy(state=state, port=port)
