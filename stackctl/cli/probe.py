"""``stackctl probe``."""

from __future__ import annotations

import collections
import textwrap
from pathlib import Path

import click
from msgspec import structs

from stackctl.cli.session import Session, verb
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes
from stackctl.values.cpulist import format_cpulist, parse_cpulist
from stackctl.values.host import UNLIMITED, Cpu, Gpu, Host, Memory, Storage

_LABEL = 10


@verb("probe")
@click.option(
    "--sysroot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Look at a recorded machine: a folder with its proc/ and sys/.",
)
@click.option("--measure", is_flag=True, help="Measure memory bandwidth and read speed (4 s).")
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of the models: its file system, free space and speed.",
)
def command(session: Session, sysroot: Path | None, measure: bool, models: Path | None) -> None:
    """Look at this machine: processors, memory, GPUs, tools, and what stands in the way.

    Its JSON is what --facts takes: with --measure, plans start from the measured bandwidth.
    """
    from stackctl.machine.files import LiveMachine, RecordedMachine
    from stackctl.probe import probe
    from stackctl.probe.storage import measure_storage, probe_storage

    if measure and sysroot is not None:
        raise StackctlError(
            "--measure needs the machine itself, not a recording", exit_code=ExitCode.USAGE
        )
    machine = LiveMachine() if sysroot is None else RecordedMachine(sysroot)
    host = probe(machine, scope=session.scope, names=True)
    if models is not None:
        storage = probe_storage(machine, str(models.resolve()))
        host = structs.replace(host, storage=measure_storage(storage) if measure else storage)
    if measure:
        session.out.progress("measure", "memory bandwidth")
        host = _measured(host)
    if session.out.json:
        session.out.data(host)
        return
    for line in picture(host):
        session.out.line(line)
    for problem in host.problems:
        label = session.out.style(f"{'warn':<{_LABEL}}", "yellow")
        for number, line in enumerate(textwrap.wrap(f"{problem.what}: {problem.why}", 69)):
            session.out.line((label if number == 0 else " " * _LABEL) + line)
        # A command is never wrapped: it is there to be pasted.
        for number, line in enumerate((problem.fix or "").splitlines()):
            session.out.line(f"{'':<{_LABEL}}{'fix: ' if number == 0 else '     '}{line}")


def _measured(host: Host) -> Host:
    from stackctl.probe.bandwidth import measure_bandwidth

    found = measure_bandwidth(host.cpu)
    bandwidth = structs.replace(host.memory.bandwidth_bytes_s, measured=found)
    return structs.replace(host, memory=structs.replace(host.memory, bandwidth_bytes_s=bandwidth))


def picture(host: Host) -> list[str]:
    """The machine in a few lines of at most 80 columns where the names allow it."""
    cpu, memory, tools = host.cpu, host.memory, host.tools
    smt = {True: "SMT on", False: "SMT off", None: ""}[cpu.smt]
    counts = [_count(cpu.sockets, "socket"), _count(cpu.cores, "core"), smt]
    lines = [f"{cpu.model or 'unknown processor'}   {', '.join(filter(None, counts))}"]
    if cpu.allowed is not None and cpu.allowed != cpu.online:
        lines.append(_row("allowed", f"this process may use CPU {cpu.allowed} of {cpu.online}"))
    lines += [_row("L3" if number == 0 else "", text) for number, text in enumerate(_caches(cpu))]
    for node in cpu.numa:
        where = f"cores {_cores(cpu, node.cpus)}" if node.cpus else "no cores"
        size = format_bytes(node.memory_bytes) if node.memory_bytes is not None else "size unknown"
        lines.append(_row(f"node {node.id}", f"{where}, {size}"))
    total = format_bytes(memory.total_bytes) if memory.total_bytes is not None else "unknown"
    free = (
        ""
        if memory.available_bytes is None
        else f", {format_bytes(memory.available_bytes)} available"
    )
    limit = "" if memory.limit_bytes is None else f", limited to {format_bytes(memory.limit_bytes)}"
    lines.append(_row("memory", total + free + limit))
    lines += [_row("", text) for text in _bandwidth(memory)]
    if cpu.isa:
        lines.append(_row("isa", " ".join(cpu.isa)))
    for gpu in host.gpus:
        lines += _gpu(gpu)
    if host.storage is not None:
        lines.append(_row("models", _storage(host.storage)))
    quadlet = " (Quadlet)" if tools.quadlet_generator else ""
    parts = [
        tools.os or tools.kernel,
        f"podman {tools.podman}{quadlet}" if tools.podman else None,
        f"systemd {tools.systemd}" if tools.systemd else None,
        f"cgroup v{tools.cgroup_version}" if tools.cgroup_version else None,
    ]
    text = ", ".join(part for part in parts if part) or "unknown"
    for number, line in enumerate(textwrap.wrap(text, 69)):
        lines.append(_row("host" if number == 0 else "", line))
    if host.limits.memlock_bytes is not None:
        locked = host.limits.memlock_bytes
        text = "any amount" if locked == UNLIMITED else f"at most {format_bytes(locked)}"
        lines.append(_row("limits", f"{host.scope} services may lock {text} of memory"))
    return lines


def _storage(storage: Storage) -> str:
    parts = [storage.path, storage.filesystem]
    if storage.free_bytes is not None:
        parts.append(f"{format_bytes(storage.free_bytes)} free")
    if storage.read_bytes_s is not None:
        parts.append(f"reads {format_bytes(round(storage.read_bytes_s))}/s")
    return ", ".join(part for part in parts if part)


def _bandwidth(memory: Memory) -> list[str]:
    speed, parts = memory.bandwidth_bytes_s, []
    if memory.channels is not None:
        rate = f" at {memory.speed_mt_s} MT/s" if memory.speed_mt_s else ""
        parts.append(f"{memory.channels} channels{rate}")
    if speed.theoretical is not None:
        parts.append(f"{speed.theoretical / 1e9:.0f} GB/s peak ({memory.bandwidth_source})")
    if speed.measured is not None:
        parts.append(f"{speed.measured / 1e9:.0f} GB/s measured")
    return [", ".join(parts)] if parts else []


def _gpu(gpu: Gpu) -> list[str]:
    size = "" if gpu.memory_bytes is None else f"   {format_bytes(gpu.memory_bytes)}"
    if gpu.memory_bytes is not None and gpu.free_bytes is not None:
        size += f" ({format_bytes(gpu.free_bytes)} free)"
    capability = gpu.compute_capability
    sm = "" if capability is None else f"   sm_{capability.replace('.', '')}"
    parts = [
        f"driver {gpu.driver}" if gpu.driver else None,
        f"CUDA {gpu.cuda}" if gpu.cuda else None,
        f"node {gpu.numa_node}" if gpu.numa_node is not None else None,
        f"{gpu.power_limit_w} W" if gpu.power_limit_w else None,
        gpu.pcie,
        f"CDI {gpu.cdi}" if gpu.cdi else "no CDI device",
    ]
    lines = [_row(f"GPU {gpu.index}", f"{gpu.name or gpu.pci or 'unknown'}{size}{sm}")]
    lines.append(_row("", "  ".join(part for part in parts if part)))
    for process in gpu.processes:
        held = format_bytes(process.memory_bytes) if process.memory_bytes else "some memory"
        lines.append(_row("", f"{process.command or 'process'} ({process.pid}) holds {held}"))
    return lines


def _row(label: str, text: str) -> str:
    return f"  {label:<{_LABEL - 2}}{text}"


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _cores(cpu: Cpu, cpus: str) -> str:
    """CPU numbers, one for each physical core."""
    members = set(parse_cpulist(cpus))
    groups = (members & set(parse_cpulist(core)) for core in cpu.siblings)
    first = {min(group) for group in groups if group}
    return format_cpulist(first or members)


def _caches(cpu: Cpu) -> list[str]:
    """``16 x 32 MiB, one core each``; domains that differ get a line each."""
    kinds: collections.Counter[tuple[int | None, int]] = collections.Counter()
    for cache in cpu.l3:
        cores = len(parse_cpulist(_cores(cpu, cache.cpus)))
        kinds[cache.bytes, cores] += 1
    return [
        f"{number} x {format_bytes(size) if size is not None else 'unknown size'}, "
        f"{'one core' if cores == 1 else f'{cores} cores'}{' each' if number > 1 else ''}"
        for (size, cores), number in kinds.items()
    ]
