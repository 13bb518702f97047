"""What on a host stands in the way of a stack: judged from a Host alone, with the fix of each.

``fail`` keeps a stack from starting as planned, ``warn`` makes it slower or
less dependable, ``info`` is worth knowing, ``skip`` could not be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stackctl.probe.doctor_gpu import DEFAULT_CUDA, gpu_findings, numbers
from stackctl.probe.problems import CGROUP_FIX, DELEGATE, MEMLOCK, code_of, drop_in, provision
from stackctl.quantity import format_bytes
from stackctl.values.cpulist import parse_cpulist
from stackctl.values.host import UNLIMITED, Host, Problem, ProblemCode
from stackctl.values.result import Result, Status

_ORDER: tuple[Status, ...] = ("fail", "warn", "info", "skip", "ok")
_OLDEST_PODMAN = (4, 4)
_HIGH_SWAPPINESS = 30


@dataclass(frozen=True)
class Needs:
    """What a profile asks of the host."""

    memlock_bytes: int | None
    cpuset: bool
    gpu: bool
    nvfp4: bool | None
    cuda: str | None


def findings(
    host: Host,
    *,
    memlock_bytes: int | None = None,
    needs_cpuset: bool = False,
    needs_gpu: bool = False,
    nvfp4: bool | None = None,
    cuda: str | None = DEFAULT_CUDA,
) -> tuple[Result, ...]:
    """Everything that was looked at, most important first.

    Args:
        host: the machine, as probed for the scope that will run the stack.
        memlock_bytes: memory that the engine wants to lock; None: it locks none.
        needs_cpuset: the stack is bound to CPUs or nodes.
        needs_gpu: the stack uses a GPU.
        nvfp4: whether its model is quantised so; None: unknown.
        cuda: the CUDA of its image; None: unknown.
    """
    needs = Needs(memlock_bytes, needs_cpuset, needs_gpu, nvfp4, cuda)
    checks: tuple[Callable[[Host, Needs], Iterator[Result]], ...] = (
        _podman, _quadlet, _systemd, _cgroup, _gpu, _memlock, _cpuset,
        _linger, _limits, _governor, _numa_balancing, _hugepages, _swap,
    )  # fmt: skip
    found = [result for check in checks for result in check(host, needs)]
    # A problem of the probe that no check spoke of must not get lost.
    told = {result.evidence for result in found}
    for problem in host.problems:
        if problem.why not in told and code_of(problem) not in _JUDGED:
            found.append(_of_problem("probe", "warn", problem))
    return tuple(sorted(found, key=lambda result: _ORDER.index(result.status)))


_PODMAN: tuple[ProblemCode, ...] = ("podman-missing", "podman-no-answer", "podman-too-old")
_SYSTEMD: tuple[ProblemCode, ...] = ("systemd-not-running", "user-manager-not-running")
_CPUSET: tuple[ProblemCode, ...] = ("cpuset-not-delegated", "cpuset-missing")
_MEMLOCK: tuple[ProblemCode, ...] = ("memlock-limited", "memlock-unknown")
#: Problems that the checks judge anew, from the same facts.
_JUDGED: tuple[ProblemCode, ...] = (
    *_PODMAN, "quadlet-missing", *_SYSTEMD, "cgroup-v1", "linger-off", *_CPUSET, *_MEMLOCK,
    "recording-incomplete",
)  # fmt: skip


def _problem(host: Host, *codes: ProblemCode) -> Problem | None:
    return next((found for found in host.problems if code_of(found) in codes), None)


def _of_problem(name: str, status: Status, problem: Problem, expected: str | None = None) -> Result:
    return Result(
        name=name, status=status, expected=expected, actual=problem.what, evidence=problem.why,
        remedy=problem.fix,
    )  # fmt: skip


def _unseen(name: str, expected: str) -> Result:
    return Result(name=name, status="skip", expected=expected, actual="unknown")


def _gpu(host: Host, needs: Needs) -> Iterator[Result]:
    if needs.gpu:
        yield from gpu_findings(host, nvfp4=needs.nvfp4, cuda=needs.cuda)


def _podman(host: Host, _needs: Needs) -> Iterator[Result]:
    expected = "podman 4.4 or newer"
    version = host.tools.podman
    problem = _problem(host, *_PODMAN)
    if problem is not None:
        yield _of_problem("podman", "fail", problem, expected)
    elif version is None:
        yield _unseen("podman", expected)
    else:
        old = numbers(version) < _OLDEST_PODMAN
        yield Result(
            name="podman", status="fail" if old else "ok", expected=expected, actual=version,
            remedy="upgrade to Debian 13, Ubuntu 24.04 or newer" if old else None,
        )  # fmt: skip


def _quadlet(host: Host, _needs: Needs) -> Iterator[Result]:
    expected = "podman's Quadlet generator where systemd finds it"
    problem = _problem(host, "quadlet-missing")
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
    problem = _problem(host, *_SYSTEMD)
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
    problem = _problem(host, "cgroup-v1")
    yield Result(
        name="cgroup",
        status="ok" if version == 2 else "fail",
        expected="version 2",
        actual=f"version {version}",
        remedy=None if version == 2 else (problem and problem.fix) or CGROUP_FIX,
    )


def _linger(host: Host, _needs: Needs) -> Iterator[Result]:
    if host.scope != "user" or host.tools.linger is None or host.tools.systemd_running is False:
        return
    problem = _problem(host, "linger-off")
    yield Result(
        name="linger",
        status="ok" if host.tools.linger else "warn",
        expected="user services outlive the login session",
        actual="on" if host.tools.linger else "off: they end at logout",
        evidence=problem.why if problem else None,
        remedy=None
        if host.tools.linger
        else (problem and problem.fix)
        or provision("linger", 'sudo loginctl enable-linger "$USER"'),
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
    problem = _problem(host, *_MEMLOCK)
    fix = problem.fix if problem else None
    if problem is None and host.scope == "user":
        fix = drop_in("memlock", MEMLOCK, "LimitMEMLOCK=infinity")
    yield Result(
        # Such a plan maps the model without locking it, and starts.
        name="memlock", status="warn", expected=expected,
        actual=f"{actual}: the model stays unlocked",
        evidence=problem.why if problem else None, remedy=fix,
    )  # fmt: skip


def _cpuset(host: Host, needs: Needs) -> Iterator[Result]:
    nodes = len(host.cpu.numa)
    if (not needs.cpuset and nodes < 2) or host.tools.cgroup_version == 1:
        # Version 1 is a finding of its own, and delegates nothing that Quadlet could use.
        return
    expected = "services can be bound to CPUs and NUMA nodes (cpuset)"
    if host.tools.cgroup_version is None and not host.tools.cgroup_controllers:
        yield _unseen("cpuset", expected)
        return
    given = " ".join(host.tools.cgroup_controllers) or "nothing"
    if "cpuset" in host.tools.cgroup_controllers:
        yield Result(name="cpuset", status="ok", expected=expected, actual=given)
        return
    problem = _problem(host, *_CPUSET)
    fix = problem.fix if problem else None
    if problem is None and host.scope == "user":
        fix = drop_in("cpuset", DELEGATE, "Delegate=cpu cpuset io memory pids")
    yield Result(
        name="cpuset", status="fail" if needs.cpuset else "warn", expected=expected,
        actual=f"delegated: {given}", evidence=problem.why if problem else None, remedy=fix,
    )  # fmt: skip


def _sysctl(item: str, name: str, value: int) -> str:
    file = f"/etc/sysctl.d/90-stackctl-{item}.conf"
    return provision(item, f"echo '{name} = {value}' | sudo tee {file} && sudo sysctl --system")


def _numa_balancing(host: Host, _needs: Needs) -> Iterator[Result]:
    on, nodes = host.tools.numa_balancing, len(host.cpu.numa)
    if on is None or nodes < 2:
        return
    yield Result(
        name="numa-balancing",
        status="warn" if on else "ok",
        expected=f"off: placement over the {nodes} nodes is planned",
        actual="on: the kernel moves pages of the model while it runs" if on else "off",
        remedy=_sysctl("numa-balancing", "kernel.numa_balancing", 0) if on else None,
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
        else provision(
            "governor",
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        ),
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
        remedy=provision(
            "transparent-hugepages",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
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
        remedy=_sysctl("swappiness", "vm.swappiness", 10)
        if high and needs.memlock_bytes is None
        else None,
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
