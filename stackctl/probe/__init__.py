"""The probe of a machine: processors, memory, GPUs, tools and limits as one Host."""

from __future__ import annotations

from stackctl.machine.machine import Machine
from stackctl.probe.cpu import CpuInfoFallback, probe_cpu, read_cpuinfo
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.gpu import probe_gpus
from stackctl.probe.memory import probe_memory, total_memory
from stackctl.probe.nvml import Nvml
from stackctl.probe.tools import can_raise_limits, probe_limits, probe_tools, start_commands
from stackctl.requirements import REQUIREMENTS, host_paths
from stackctl.requirements.facts import LaunchFacts, Scope
from stackctl.values.host import Host

__all__ = ["probe"]


def probe(machine: Machine, *, scope: Scope, names: bool = False) -> Host:
    """Return all facts of a machine, for services of one scope.

    A fact that cannot be read is None and, if it matters, a Problem; nothing is raised.

    Args:
        machine: the live machine or a recorded one.
        scope: the service manager that will run the services: this user's or the system's.
        names: also ask py-cpuinfo, on the live machine, if the kernel does not name the
            processor or its instruction sets; it takes about a second.
    """
    reader = FactReader(machine)
    commands = start_commands(machine)
    nvml = Nvml(reader)
    info = read_cpuinfo(reader)
    unnamed = info.model is None or info.flags is None
    asked = CpuInfoFallback() if names and machine.live and unnamed else None
    cpu = probe_cpu(reader, info, total_bytes=total_memory(reader))
    memory = probe_memory(reader, cpu, virtual=info.virtual)
    seen = probe_tools(reader, commands, scope)
    gpus = probe_gpus(reader, nvml, seen.tools.cdi)
    limits = probe_limits(reader, scope, seen.user)
    facts = LaunchFacts(
        live=machine.live,
        scope=scope,
        probed=seen,
        limits=limits,
        may_raise=can_raise_limits(reader),
        nodes=len(cpu.numa),
        memlock_reachable=probe_limits(reader, "system", seen.user).memlock_bytes,
        drop_ins=frozenset(path for path in host_paths.FILES.values() if reader.exists(path)),
    )
    launch = (problem for requirement in REQUIREMENTS for problem in requirement.problems(facts))
    return Host(
        scope=scope,
        cpu=asked.complete(cpu) if asked else cpu,
        memory=memory,
        gpus=gpus,
        tools=seen.tools,
        limits=limits,
        problems=(*launch, *reader.problems()),
    )
