"""Limits of a container or unit that stackctl itself runs in: CPU time, CPUs and memory."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.quantity import format_bytes
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.requirement import Requirement
from stackctl.values.host import Host
from stackctl.values.result import Result

_OUTSIDE = "run it outside this container or unit, or raise the limit there"


class CpuQuota(Requirement):
    """No cgroup grants less CPU time than the cores have."""

    name = "cpu-quota"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding if the quota is below the time of all cores."""
        quota, cores = host.cpu.quota_cpus, host.cpu.cores
        if quota is not None and cores and quota < cores:
            yield self.result(
                "warn", f"a cgroup grants the time of {quota:g}",
                expected=f"the time of {cores} cores",
                remedy=f"{_OUTSIDE} (CPUQuota=, podman --cpus)",
            )  # fmt: skip


class AllowedCpus(Requirement):
    """This process may use every CPU that is online."""

    name = "cpus-allowed"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding if this process may not use all CPUs that are online."""
        cpu = host.cpu
        if cpu.allowed and cpu.online and cpu.allowed != cpu.online:
            allowed, online = len(cpu.allowed), len(cpu.online)
            yield self.result(
                "warn", f"{allowed} ({cpu.allowed})", expected=f"{online} CPUs ({cpu.online})",
                remedy=f"{_OUTSIDE} (AllowedCPUs=, podman --cpuset-cpus, taskset)",
            )  # fmt: skip


class MemoryLimit(Requirement):
    """No cgroup grants less memory than the machine has."""

    name = "memory-limit"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding if the limit is below the machine's memory."""
        total, limit = host.memory.total_bytes, host.memory.limit_bytes
        if total is not None and limit is not None and limit < total:
            yield self.result(
                "warn", f"a cgroup grants {format_bytes(limit)}", expected=format_bytes(total),
                remedy=f"{_OUTSIDE} (MemoryMax=, podman --memory)",
            )  # fmt: skip
