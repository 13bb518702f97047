"""The commands that show this machine and the obstacles on it: probe, doctor."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import structs

from stackctl.cli.options import FOLDER, facts_option, plan_options, profile_names
from stackctl.cli.output import WIDTH, Row, labelled_lines
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import UNLIMITED, Cpu, Gpu, Host, Memory, NumaNode, Storage, Tools
from stackctl.values.result import Result

if TYPE_CHECKING:
    from stackctl.deploy.planning import PlanBasis
    from stackctl.values.plan import Plan, Verdict
    from stackctl.values.profile import Overrides, Profile

_COLUMN = 10
#: Most groups, CPU ranges or NUMA nodes that are listed in full.
_MANY = 8


@stackctl_command("probe")
@click.option(
    "--sysroot", type=FOLDER, help="Read a recorded machine: a folder with its proc/ and sys/."
)
@click.option("--measure", is_flag=True, help="Measure memory bandwidth and read speed (4 s).")
@click.option(
    "--models", type=FOLDER, help="The folder of the models: its file system, free space and speed."
)
def probe(session: Session, sysroot: Path | None, measure: bool, models: Path | None) -> None:
    """Show this machine: processors, memory, GPUs, tools, and problems.

    Other commands read its --json output with --facts. With --measure it has the measured
    bandwidth, which those plans then use.
    """
    from stackctl.machine.machine import Machine, RecordedMachine
    from stackctl.probe import probe as probe_host
    from stackctl.probe.storage import measure_storage, probe_storage

    if measure and sysroot is not None:
        raise StackctlError(
            "--measure needs the machine itself, not a recording", exit_code=ExitCode.USAGE
        )
    machine = Machine() if sysroot is None else RecordedMachine(sysroot)
    host = probe_host(machine, scope=session.scope, names=True)
    if models is not None:
        storage = probe_storage(machine, str(models.resolve()))
        host = structs.replace(host, storage=measure_storage(storage) if measure else storage)
    if measure:
        session.out.progress("measure", "memory bandwidth")
        host = _measured(host)
    if session.out.wrote_json(host):
        return
    for line in machine_overview(host):
        session.out.line(line)
    for problem in host.problems:
        text = f"{problem.what}: {problem.why}"
        session.out.labelled("warn", text, column=_COLUMN, color="yellow")
        session.out.fix(problem.fix, indent=_COLUMN)


def _measured(host: Host) -> Host:
    from stackctl.probe.bandwidth import measure_bandwidth

    found = measure_bandwidth(host.cpu)
    bandwidth = structs.replace(host.memory.bandwidth_bytes_s, measured=found)
    return structs.replace(host, memory=structs.replace(host.memory, bandwidth_bytes_s=bandwidth))


def machine_overview(host: Host) -> list[str]:
    """Return the machine in a few lines, of at most 80 columns where the names allow it."""
    rows = [*_cpu(host.cpu), *_nodes(host), *_memory(host.memory)]
    if host.cpu.isa:
        rows.append(("isa", " ".join(host.cpu.isa)))
    for gpu in host.gpus:
        rows += _gpu(gpu)
    if host.storage is not None:
        rows.append(("models", _storage(host.storage)))
    rows.append(("host", _software(host.tools)))
    if host.limits.memlock_bytes is not None:
        locked = host.limits.memlock_bytes
        text = "any amount" if locked == UNLIMITED else f"at most {format_bytes(locked)}"
        rows.append(("limits", f"{host.scope} services may lock {text} of memory"))
    lines = _title(host.cpu)
    for label, text in rows:
        lines += labelled_lines(label, text, column=_COLUMN, indent=2)
    return lines


def _title(cpu: Cpu) -> list[str]:
    """Return the processor and the numbers of its parts, in one line or two."""
    smt = {True: "SMT on", False: "SMT off", None: ""}[cpu.smt]
    dies = cpu.dies if (cpu.dies or 0) > (cpu.sockets or 0) else None
    counts = [
        _count(cpu.sockets, "socket"), _count(dies, "die"), _count(cpu.cores, "core"), smt,
    ]  # fmt: skip
    model, parts = cpu.model or "unknown processor", ", ".join(filter(None, counts))
    if len(model) + len(parts) + 3 <= WIDTH:
        return [f"{model}   {parts}"]
    return [model, *labelled_lines("", parts, column=_COLUMN)]


def _cpu(cpu: Cpu) -> Iterator[Row]:
    if cpu.allowed is not None and cpu.allowed != cpu.online:
        text = f"this process may use CPU {_short(cpu.allowed)} of {_short(cpu.online)}"
        yield "allowed", text
    if cpu.quota_cpus is not None:
        yield "quota", f"a cgroup grants the time of {cpu.quota_cpus:g} CPUs"
    if cpu.offline is not None:
        yield "offline", f"CPU {_short(cpu.offline)}"
    if cpu.kinds:
        kinds = (f"{kind.name} {_short(_cores(cpu, kind.cpus))}" for kind in cpu.kinds)
        yield "kinds", "cores: " + ", ".join(kinds)
    if cpu.threads_per_core is not None and cpu.threads_per_core > 1:
        yield "threads", f"{cpu.threads_per_core} a core: {_siblings(cpu)}"
    for number, text in enumerate(_caches(cpu)):
        yield "" if number else "L3", text


def _memory(memory: Memory) -> Iterator[Row]:
    text = format_bytes(memory.total_bytes) if memory.total_bytes is not None else "unknown"
    if memory.available_bytes is not None:
        text += f", {format_bytes(memory.available_bytes)} available"
    if memory.limit_bytes is not None:
        text += f", limited to {format_bytes(memory.limit_bytes)}"
    yield "memory", text
    if text := _bandwidth(memory):
        yield "", text


def _software(tools: Tools) -> str:
    quadlet = " (Quadlet)" if tools.quadlet_generator else ""
    parts = [
        tools.os or tools.kernel,
        f"podman {tools.podman}{quadlet}" if tools.podman else None,
        f"systemd {tools.systemd}" if tools.systemd else None,
        f"cgroup v{tools.cgroup_version}" if tools.cgroup_version else None,
    ]
    return ", ".join(part for part in parts if part) or "unknown"


def _storage(storage: Storage) -> str:
    parts = [storage.path, storage.filesystem]
    if storage.free_bytes is not None:
        parts.append(f"{format_bytes(storage.free_bytes)} free")
    if storage.read_bytes_s is not None:
        parts.append(f"reads {format_bytes(round(storage.read_bytes_s))}/s")
    return ", ".join(part for part in parts if part)


def _bandwidth(memory: Memory) -> str:
    speed, parts = memory.bandwidth_bytes_s, []
    if memory.channels is not None:
        rate = f" at {memory.speed_mt_s} MT/s" if memory.speed_mt_s else ""
        parts.append(f"{memory.channels} channels{rate}")
    if speed.theoretical is not None:
        parts.append(f"{speed.theoretical / 1e9:.0f} GB/s peak ({memory.bandwidth_source})")
    if speed.measured is not None:
        parts.append(f"{speed.measured / 1e9:.0f} GB/s measured")
    return ", ".join(parts)


def _gpu(gpu: Gpu) -> Iterator[Row]:
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
    yield f"GPU {gpu.index}", f"{gpu.name or gpu.pci or 'unknown'}{size}{sm}"
    yield "", "  ".join(part for part in parts if part)
    for process in gpu.processes:
        held = format_bytes(process.memory_bytes) if process.memory_bytes else "some memory"
        yield "", f"{process.command or 'process'} ({process.pid}) holds {held}"


def _nodes(host: Host) -> Iterator[Row]:
    """Yield a row for each NUMA node. If there are many, neighbours that are alike share a row."""
    runs: list[tuple[tuple[str, str, str], list[NumaNode]]] = []
    for node in host.cpu.numa:
        size = format_bytes(node.memory_bytes) if node.memory_bytes is not None else "size unknown"
        cores = len(_cores(host.cpu, node.cpus))
        gpus = "".join(f", GPU {gpu.index}" for gpu in host.gpus if gpu.numa_node == node.id)
        alike = (_count_cores(cores), size, gpus)
        if len(host.cpu.numa) > _MANY and runs and runs[-1][0] == alike:
            runs[-1][1].append(node)
        else:
            runs.append((alike, [node]))
    for (each, size, gpus), nodes in runs:
        if len(nodes) > 1:
            numbers = CpuList(node.id for node in nodes)
            yield "nodes", f"{numbers}: {each} and {size} each{gpus}"
            continue
        where = f"cores {_short(_cores(host.cpu, nodes[0].cpus))}" if nodes[0].cpus else "no cores"
        yield f"node {nodes[0].id}", f"{where}, {size}{gpus}"


def _siblings(cpu: Cpu) -> str:
    """Return ``n and n+64``, or the CPUs of some cores if the cores do not follow such a rule."""
    steps = {tuple(number - core.first for number in core) for core in cpu.siblings if core}
    if len(steps) == 1 and cpu.threads_per_core == 2:
        return f"n and n+{steps.pop()[1]}"
    return _some([str(core) for core in cpu.siblings if len(core) > 1])


def _some(groups: list[str]) -> str:
    """Join a few groups; of more than ``_MANY``, the first three and the last."""
    few = groups if len(groups) <= _MANY else [*groups[:3], "...", groups[-1]]
    return " | ".join(few)


def _short(cpus: CpuList | None) -> str:
    """Return a short form of a CPU list: "0-60 by 4" for even steps, or a few of its ranges."""
    numbers = tuple(cpus or ())
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}-{numbers[-1]} by {steps.pop()}"
    text = str(cpus or "")
    items = text.split(",")
    return ",".join([*items[:3], "...", items[-1]]) if len(items) > _MANY else text


def _count_cores(number: int) -> str:
    return {0: "no core", 1: "one core"}.get(number, f"{number} cores")


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _cores(cpu: Cpu, cpus: CpuList) -> CpuList:
    """Return one CPU for each physical core; all of ``cpus`` if the cores are unknown."""
    groups = (cpus & core for core in cpu.siblings)
    return CpuList(group.first for group in groups if group) or cpus


def _caches(cpu: Cpu) -> list[str]:
    """Return ``2 x 32 MiB, 8 cores each: 0-7 | 8-15``, a line for each kind of L3 domain."""
    kinds: dict[tuple[int | None, int], list[str]] = {}
    for cache in cpu.l3:
        members = _cores(cpu, cache.cpus)
        kinds.setdefault((cache.bytes, len(members)), []).append(_short(members))
    lines = []
    for (size, cores), groups in kinds.items():
        text = f"{len(groups)} x {format_bytes(size) if size is not None else 'unknown size'}"
        each = " each" if len(groups) > 1 else ""
        which = (
            f": {_some(groups)}" if cores > 1 and (len(cpu.l3) > 1 or cores != cpu.cores) else ""
        )
        lines.append(f"{text}, {_count_cores(cores)}{each}{which}")
    return lines


@stackctl_command("doctor")
@click.argument("profile", required=False, shell_complete=profile_names)
@plan_options
@facts_option
def doctor(session: Session, profile: str | None, asked: Overrides, facts: Path | None) -> None:
    """Find the obstacles on this host to PROFILE; without PROFILE, to stacks in general.

    Each finding comes with the command that fixes it. Exits 6 when something must be fixed first,
    else 0: warnings do not count.
    """
    from stackctl.probe.doctor import findings
    from stackctl.values.result import DoctorReport

    basis = session.plan_basis(facts)
    if profile is None:
        results = list(findings(basis.host))
    else:
        wanted = session.profiles().resolve(profile, asked)
        results = _profile_findings(session, basis, wanted, live=facts is None)
    order = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 4}
    results.sort(key=lambda result: order[result.status])
    if not session.out.wrote_json(DoctorReport(profile=profile, results=tuple(results))):
        session.out.results(results)
    if any(result.status == "fail" for result in results):
        raise click.exceptions.Exit(int(ExitCode.HOST))


def _profile_findings(
    session: Session, basis: PlanBasis, wanted: Profile, *, live: bool
) -> list[Result]:
    """Return the findings for a profile: of its plan, of its GPUs, and of the host for its needs.

    If the host is this machine (``live``), images are inspected and containers tried.
    """
    from stackctl.deploy.planning import preview
    from stackctl.engines import uses_gpu
    from stackctl.machine.podman import image_cuda
    from stackctl.probe.doctor import findings
    from stackctl.provision.items import binds_cpus
    from stackctl.requirements.gpu import DEFAULT_CUDA

    results: list[Result] = []
    on_gpu = uses_gpu(wanted)
    cpuset = binds_cpus(wanted)
    # The CUDA version of a profile's own image is unknown until the image is here.
    cuda = DEFAULT_CUDA if wanted.image is None else None
    weights: int | None = None
    nvfp4: bool | None = None
    try:
        plan = preview(basis, session.profiles(), wanted, session.out).plan
        nvfp4 = plan.model.is_nvfp4
        if on_gpu and live:
            cuda = image_cuda(plan.image) or cuda
        weights = None if on_gpu else plan.model.weights_bytes
        cpuset = cpuset or plan.placement.policy == "interleave"
        results.append(_plan_result(plan.verdict))
        if plan.placement.gpus and live:
            results.append(_proof(plan, basis.host))
    except StackctlError as error:
        results.append(Result(name="plan", status="fail", actual=error.message, remedy=error.hint))
    results += findings(
        basis.host,
        memlock_bytes=weights,
        needs_cpuset=cpuset,
        needs_gpu=on_gpu,
        nvfp4=nvfp4,
        cuda=cuda,
    )
    return results


def _proof(plan: Plan, host: Host) -> Result:
    """Check that Podman can make a container with the GPUs; skip the check without the image."""
    from stackctl.deploy import gpu_access
    from stackctl.machine import podman

    result = functools.partial(
        Result, name="gpu-proof", expected="podman makes a container with the GPU"
    )
    if not podman.image_exists(plan.image):
        return result(
            status="skip",
            actual="not tried: the image is not here",
            remedy=f"podman pull {plan.image}",
        )
    try:
        gpu_access.test_gpu_container(plan.image, gpu_access.planned_gpus(host, plan), host)
    except StackctlError as error:
        evidence = " ".join(error.details) or None
        return result(status="fail", actual=error.message, evidence=evidence, remedy=error.hint)
    return result(status="ok", actual="it does")


def _plan_result(verdict: Verdict) -> Result:
    bad = verdict.fits is False or verdict.viable is False
    wrong = "does not fit" if verdict.fits is False else "not viable"
    return Result(
        name="plan",
        status="fail" if bad else "ok",
        actual=f"{wrong}: the plan says what helps" if bad else "fits",
        evidence="; ".join(verdict.reasons) if bad else None,
        remedy=_plan_command() if bad else None,
    )


def _plan_command() -> str:
    """Return the command that shows the plan, with the options of the present command."""
    given = click.get_current_context()
    words = ["stackctl", "plan", given.params["profile"]]
    for option in given.command.params:
        value = given.params.get(option.name or "")
        if isinstance(option, click.Option) and value and not option.is_flag:
            for one in value if option.multiple else (value,):
                words += [option.opts[0], str(one)]
    return shlex.join(words)
