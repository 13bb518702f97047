"""What on a host stands in the way of a stack: judged from a Host alone, with the fix of each.

The kinds of severity: ``fail`` keeps a stack from starting as planned, ``warn`` makes it slower or
less dependable, ``info`` is worth knowing, ``skip`` could not be seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stackctl.quantity import format_bytes
from stackctl.values.cpulist import parse_cpulist
from stackctl.values.host import UNLIMITED, Gpu, Host, Problem
from stackctl.values.result import Result, Status

_ORDER: tuple[Status, ...] = ("fail", "warn", "info", "skip", "ok")
_OLDEST_PODMAN = (4, 4)
#: What images with CUDA 13 need, and the first GPUs that compute in nvfp4.
_OLDEST_DRIVER, _CUDA = 580, "13"
_NVFP4_SINCE = (10, 0)
#: Less free than this part of a GPU: something else holds it.
_FREE_ENOUGH = 0.9
_HIGH_SWAPPINESS = 30
_GENERATE = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"


@dataclass(frozen=True)
class Needs:
    """What a profile asks of the host."""

    memlock_bytes: int | None
    cpuset: bool
    gpu: bool


def findings(
    host: Host,
    *,
    memlock_bytes: int | None = None,
    needs_cpuset: bool = False,
    needs_gpu: bool = False,
) -> tuple[Result, ...]:
    """Everything that was looked at, most important first.

    Args:
        host: the machine, as probed for the scope that will run the stack.
        memlock_bytes: memory that the engine wants to lock; None: it locks none.
        needs_cpuset: the stack is bound to CPUs or nodes.
        needs_gpu: the stack uses a GPU.
    """
    needs = Needs(memlock_bytes, needs_cpuset, needs_gpu)
    checks: tuple[Callable[[Host, Needs], Iterator[Result]], ...] = (
        _podman, _quadlet, _systemd, _cgroup, _gpus, _driver, _capability, _cdi, _memlock, _cpuset,
        _linger, _gpu_memory, _selinux, _limits, _governor, _numa_balancing, _hugepages, _swap,
    )  # fmt: skip
    found = [result for check in checks for result in check(host, needs)]
    # A problem of the probe that no check spoke of must not get lost.
    told = {result.evidence for result in found}
    for problem in host.problems:
        if problem.why not in told and not problem.what.startswith(_JUDGED):
            found.append(_of_problem("probe", "warn", problem))
    return tuple(sorted(found, key=lambda result: _ORDER.index(result.status)))


#: Problems that the checks judge anew, from the same facts.
_JUDGED = (
    "podman", "no Quadlet", "systemd is not", "no service manager", "cgroup version 1",
    "user services end", "cpuset is not", "no cpuset", "locked memory", "tools: not recorded",
)  # fmt: skip


def _problem(host: Host, *starts: str) -> Problem | None:
    return next((found for found in host.problems if found.what.startswith(starts)), None)


def _of_problem(name: str, status: Status, problem: Problem, expected: str | None = None) -> Result:
    return Result(
        name=name, status=status, expected=expected, actual=problem.what, evidence=problem.why,
        remedy=problem.fix,
    )  # fmt: skip


def _unseen(name: str, expected: str) -> Result:
    return Result(name=name, status="skip", expected=expected, actual="unknown")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]{1,6}", version)[:2])


def _podman(host: Host, _needs: Needs) -> Iterator[Result]:
    expected = "podman 4.4 or newer"
    version = host.tools.podman
    problem = _problem(host, "podman")
    if problem is not None:
        yield _of_problem("podman", "fail", problem, expected)
    elif version is None:
        yield _unseen("podman", expected)
    else:
        old = _numbers(version) < _OLDEST_PODMAN
        yield Result(
            name="podman", status="fail" if old else "ok", expected=expected, actual=version,
            remedy="upgrade to Debian 13, Ubuntu 24.04 or newer" if old else None,
        )  # fmt: skip


def _quadlet(host: Host, _needs: Needs) -> Iterator[Result]:
    expected = "podman's Quadlet generator where systemd finds it"
    problem = _problem(host, "no Quadlet")
    if problem is not None:
        yield _of_problem("quadlet", "fail", problem, expected)
    elif host.tools.quadlet_generator is None:
        yield _unseen("quadlet", expected)
    else:
        yield Result(
            name="quadlet", status="ok", expected=expected, actual=host.tools.quadlet_generator
        )


def _systemd(host: Host, _needs: Needs) -> Iterator[Result]:
    expected = "systemd runs the machine" + (
        " and this user's services" if host.scope == "user" else ""
    )
    problem = _problem(host, "systemd is not", "no service manager")
    if problem is not None:
        yield _of_problem("systemd", "fail", problem, expected)
    elif host.tools.systemd_running is None:
        yield _unseen("systemd", expected)
    elif not host.tools.systemd_running:
        yield Result(
            name="systemd", status="fail", expected=expected, actual="it does not run",
            remedy="boot this machine or container with systemd as process 1",
        )  # fmt: skip
    else:
        yield Result(name="systemd", status="ok", expected=expected, actual=host.tools.systemd)


def _cgroup(host: Host, _needs: Needs) -> Iterator[Result]:
    version = host.tools.cgroup_version
    if version is None:
        yield _unseen("cgroup", "version 2")
        return
    yield Result(
        name="cgroup",
        status="ok" if version == 2 else "fail",
        expected="version 2",
        actual=f"version {version}",
        remedy=None
        if version == 2
        else "add systemd.unified_cgroup_hierarchy=1 to the kernel command line and reboot",
    )


def _linger(host: Host, _needs: Needs) -> Iterator[Result]:
    if host.scope != "user" or host.tools.linger is None:
        return
    problem = _problem(host, "user services end")
    yield Result(
        name="linger",
        status="ok" if host.tools.linger else "warn",
        expected="user services outlive the login session",
        actual="on" if host.tools.linger else "off: they end at logout",
        evidence=problem.why if problem else None,
        remedy=None
        if host.tools.linger
        else (problem and problem.fix) or 'sudo loginctl enable-linger "$USER"',
    )


def _drop_in(name: str, line: str) -> str:
    folder = "/etc/systemd/system/user@.service.d"
    return (
        f"sudo mkdir -p {folder} && printf '[Service]\\n{line}\\n' | sudo tee {folder}/{name}.conf "
        '&& sudo systemctl daemon-reload && sudo systemctl restart "user@$(id -u).service"'
    )


def _memlock(host: Host, needs: Needs) -> Iterator[Result]:
    limit, wanted = host.limits.memlock_bytes, needs.memlock_bytes
    if wanted is None:
        return
    expected = f"{format_bytes(wanted)} can be locked"
    if limit is None:
        yield _unseen("memlock", expected)
        return
    actual = "no limit" if limit == UNLIMITED else f"{format_bytes(limit)} at most"
    if limit >= wanted:
        yield Result(name="memlock", status="ok", expected=expected, actual=actual)
        return
    problem = _problem(host, "locked memory")
    fix = problem.fix if problem else None
    if problem is None and host.scope == "user":
        fix = _drop_in("memlock", "LimitMEMLOCK=infinity")
    yield Result(
        name="memlock", status="fail", expected=expected, actual=actual,
        evidence=problem.why if problem else None,
        remedy=fix or "let the engine map the model without locking it (llama.cpp: mmap)",
    )  # fmt: skip


def _cpuset(host: Host, needs: Needs) -> Iterator[Result]:
    nodes = len(host.cpu.numa)
    if not needs.cpuset and nodes < 2:
        return
    expected = "services can be bound to CPUs and NUMA nodes (cpuset)"
    if host.tools.cgroup_version is None and not host.tools.cgroup_controllers:
        yield _unseen("cpuset", expected)
        return
    given = " ".join(host.tools.cgroup_controllers) or "nothing"
    if "cpuset" in host.tools.cgroup_controllers:
        yield Result(name="cpuset", status="ok", expected=expected, actual=given)
        return
    problem = _problem(host, "cpuset is not", "no cpuset")
    fix = problem.fix if problem else None
    if problem is None and host.scope == "user":
        fix = _drop_in("delegate", "Delegate=cpu cpuset io memory pids")
    yield Result(
        name="cpuset", status="fail" if needs.cpuset else "warn", expected=expected,
        actual=f"delegated: {given}", evidence=problem.why if problem else None, remedy=fix,
    )  # fmt: skip


def _sysctl(name: str, value: int) -> str:
    return (
        f"echo '{name} = {value}' | sudo tee /etc/sysctl.d/90-{name}.conf && sudo sysctl --system"
    )


def _numa_balancing(host: Host, _needs: Needs) -> Iterator[Result]:
    on, nodes = host.tools.numa_balancing, len(host.cpu.numa)
    if on is None or nodes < 2:
        return
    yield Result(
        name="numa-balancing",
        status="warn" if on else "ok",
        expected=f"off: placement over the {nodes} nodes is planned",
        actual="on: the kernel moves pages of the model while it runs" if on else "off",
        remedy=_sysctl("kernel.numa_balancing", 0) if on else None,
    )


def _governor(host: Host, _needs: Needs) -> Iterator[Result]:
    governor = host.cpu.governor
    if governor is None:
        return
    good = governor == "performance"
    driver = f" ({host.cpu.governor_driver})" if host.cpu.governor_driver else ""
    yield Result(
        name="governor",
        status="ok" if good else "warn",
        expected="performance",
        actual=governor + driver,
        remedy=None
        if good
        else "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    )


def _hugepages(host: Host, _needs: Needs) -> Iterator[Result]:
    mode = host.memory.transparent_hugepages
    if mode is None:
        return
    always = mode == "always"
    yield Result(
        name="transparent-hugepages",
        status="info" if always else "ok",
        expected="madvise, or any",
        actual=mode,
        evidence="good for engines; other programs may use more memory than they ask for"
        if always
        else None,
        remedy="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        if always
        else None,
    )


def _swap(host: Host, needs: Needs) -> Iterator[Result]:
    swappiness = host.tools.swappiness
    if swappiness is None:
        return
    high = swappiness > _HIGH_SWAPPINESS
    yield Result(
        name="swappiness",
        # Locked memory is never swapped out.
        status="info" if high and needs.memlock_bytes is None else "ok",
        expected=f"{_HIGH_SWAPPINESS} or less, or the model locked in memory",
        actual=str(swappiness),
        remedy=_sysctl("vm.swappiness", 10) if high and needs.memlock_bytes is None else None,
    )


def _limits(host: Host, _needs: Needs) -> Iterator[Result]:
    cpu, memory = host.cpu, host.memory
    outside = "run it outside this container or unit, or raise the limit there"
    if cpu.quota_cpus is not None and cpu.cores and cpu.quota_cpus < cpu.cores:
        yield Result(
            name="cpu-quota", status="warn", expected=f"the time of {cpu.cores} cores",
            actual=f"a cgroup grants the time of {cpu.quota_cpus:g}",
            remedy=f"{outside} (CPUQuota=, podman --cpus)",
        )  # fmt: skip
    if cpu.allowed and cpu.online and cpu.allowed != cpu.online:
        allowed, online = (len(parse_cpulist(text)) for text in (cpu.allowed, cpu.online))
        yield Result(
            name="cpus-allowed", status="warn", expected=f"{online} CPUs ({cpu.online})",
            actual=f"{allowed} ({cpu.allowed})",
            remedy=f"{outside} (AllowedCPUs=, podman --cpuset-cpus, taskset)",
        )  # fmt: skip
    total, limit = memory.total_bytes, memory.limit_bytes
    if total is not None and limit is not None and limit < total:
        yield Result(
            name="memory-limit", status="warn", expected=format_bytes(total),
            actual=f"a cgroup grants {format_bytes(limit)}",
            remedy=f"{outside} (MemoryMax=, podman --memory)",
        )  # fmt: skip


# GPUs


def _nvidia(host: Host) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in host.gpus if gpu.driver or (gpu.name or "").startswith("NVIDIA"))


def _gpus(host: Host, needs: Needs) -> Iterator[Result]:
    if not needs.gpu:
        return
    names = ", ".join(gpu.name or f"a GPU at {gpu.pci}" for gpu in host.gpus)
    yield Result(
        name="gpu",
        status="ok" if host.gpus else "fail",
        expected="a GPU",
        actual=names or "none on the PCI bus",
        remedy=None
        if host.gpus
        else "in a virtual machine pass the GPU through; else look with: lspci -nn -d 10de:",
    )


def _driver(host: Host, needs: Needs) -> Iterator[Result]:
    if not needs.gpu or not host.gpus:
        return
    expected = f"NVIDIA driver {_OLDEST_DRIVER} or newer (images with CUDA {_CUDA})"
    version = next((gpu.driver for gpu in host.gpus if gpu.driver), None)
    good = version is not None and _numbers(version)[:1] >= (_OLDEST_DRIVER,)
    ubuntu = (host.tools.os or "").startswith("Ubuntu")
    yield Result(
        name="gpu-driver",
        status="ok" if good else "fail",
        expected=expected,
        actual=version or "no driver is loaded",
        remedy=None
        if good
        else f"sudo apt-get install nvidia-driver-{_OLDEST_DRIVER}-server-open && sudo reboot"
        if ubuntu
        else f"install NVIDIA's driver {_OLDEST_DRIVER} or newer, open kernel modules, and reboot",
    )


def _capability(host: Host, needs: Needs) -> Iterator[Result]:
    known = [gpu for gpu in _nvidia(host) if gpu.compute_capability]
    if not needs.gpu or not known:
        return
    weakest = min((gpu.compute_capability or "" for gpu in known), key=_numbers)
    good = _numbers(weakest) >= _NVFP4_SINCE
    yield Result(
        name="gpu-nvfp4",
        status="ok" if good else "warn",
        expected="compute capability 10.0 or higher (12.0: RTX PRO 6000) computes in nvfp4",
        actual=weakest,
        remedy=None
        if good
        else "nvfp4 models run through Marlin, in 16 bits: choose an fp8, AWQ or GPTQ one",
    )


def _cdi(host: Host, needs: Needs) -> Iterator[Result]:
    if not needs.gpu or not host.gpus:
        return
    expected = "a CDI file that this podman can use names the GPUs"
    unnamed = [gpu for gpu in _nvidia(host) or host.gpus if gpu.cdi is None]
    specs = [spec for spec in host.tools.cdi if spec.problem is None]
    for spec in host.tools.cdi:
        if spec.problem is not None:
            fixed = re.search(r"generate it again|does not exist|cannot be parsed", spec.problem)
            yield Result(
                name="cdi", status="warn" if specs and not unnamed else "fail", expected=expected,
                actual=f"{spec.path}: {spec.problem}",
                evidence=f"podman {host.tools.podman}" if host.tools.podman else None,
                remedy=_cdi_remedy(spec.path, spec.problem) if not fixed else _GENERATE,
            )  # fmt: skip
    if not host.tools.cdi:
        yield Result(
            name="cdi", status="fail", expected=expected,
            actual="no file in /etc/cdi or /run/cdi", remedy=_GENERATE,
        )  # fmt: skip
    elif specs and unnamed:
        missing = ", ".join(gpu.uuid or gpu.name or str(gpu.index) for gpu in unnamed)
        yield Result(
            name="cdi", status="fail", expected=expected, actual=f"no device for {missing}",
            evidence=" ".join(spec.path for spec in specs), remedy=_GENERATE,
        )  # fmt: skip
    elif specs:
        names = " ".join(gpu.cdi for gpu in host.gpus if gpu.cdi)
        yield Result(name="cdi", status="ok", expected=expected, actual=names)


def _cdi_remedy(path: str, problem: str) -> str:
    if "additionalGids" in problem:
        if path.endswith(".json"):
            return "upgrade podman to 5, or delete additionalGids from the file"
        # Its numbers are the only list items in these files that are plain numbers.
        return f"sudo sed -i '/additionalGids:/d; /^ *- [0-9][0-9]*$/d' {path}"
    if "takes neither" in problem:
        return f"sudo rm {path}"
    return "upgrade podman to 5, or write the file with an older nvidia-container-toolkit"


def _gpu_memory(host: Host, needs: Needs) -> Iterator[Result]:
    for gpu in host.gpus if needs.gpu else ():
        if gpu.memory_bytes is None or gpu.free_bytes is None:
            continue
        expected = f"{_FREE_ENOUGH:.0%} of GPU {gpu.index} is free"
        actual = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)}"
        if gpu.free_bytes >= _FREE_ENOUGH * gpu.memory_bytes:
            yield Result(name="gpu-memory", status="ok", expected=expected, actual=actual)
            continue
        holders = sorted(gpu.processes, key=lambda process: -(process.memory_bytes or 0))
        named = "; ".join(
            f"process {process.pid}"
            + (f" ({process.command})" if process.command else "")
            + (f" holds {format_bytes(process.memory_bytes)}" if process.memory_bytes else "")
            for process in holders[:5]
        )
        yield Result(
            name="gpu-memory", status="warn", expected=expected, actual=actual,
            evidence=named or "the driver names no process that holds it",
            remedy="stackctl down STACK if it is a stack of yours"
            + (f", else: kill {holders[0].pid}" if holders else ", else see: nvidia-smi"),
        )  # fmt: skip


def _selinux(host: Host, needs: Needs) -> Iterator[Result]:
    if not needs.gpu or host.tools.selinux != "enforcing":
        return
    yield Result(
        name="selinux",
        status="warn",
        expected="containers may use devices (container_use_devices)",
        actual="SELinux is enforcing",
        evidence="the boolean is off unless it was set; see: getsebool container_use_devices",
        remedy="sudo setsebool -P container_use_devices=true",
    )
