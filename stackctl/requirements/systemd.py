"""systemd, which runs services, and the cgroups that limit them and stackctl itself."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.quantity import format_bytes
from stackctl.requirements.accounts import enable_linger
from stackctl.requirements.facts import LaunchFacts, StackNeeds
from stackctl.requirements.requirement import Requirement, as_root
from stackctl.values.host import Host, Problem
from stackctl.values.result import Result

_BOOT = "boot this machine or container with systemd as process 1"
#: The kernel argument that selects version 2 at boot.
KERNEL_ARGUMENT = "systemd.unified_cgroup_hierarchy=1"
_VERSION_2 = f"add {KERNEL_ARGUMENT} to the kernel command line and reboot"
_OUTSIDE = "run it outside this container or unit, or raise the limit there"


class SystemdRunning(Requirement):
    """The service manager of the scope runs."""

    name = "systemd"
    codes = ("systemd-not-running", "user-manager-not-running")

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if systemd or the user's manager does not run."""
        probed = facts.probed
        if probed.tools.systemd_running is not False:
            return
        if facts.scope == "system" or probed.booted is False:
            yield Problem(
                code="systemd-not-running",
                what="systemd is not running",
                why="process 1 is not systemd (no /run/systemd/system), which runs the services",
                fix=_BOOT,
            )
            return
        unit = f"user@{probed.user.uid}.service"
        start = f"systemctl start {unit}"
        if probed.tools.linger is False:
            start = enable_linger(probed.user)
        yield Problem(
            code="user-manager-not-running",
            what="no service manager for this user",
            why=f"{unit} does not run; user services and their limits depend on it",
            fix=as_root(facts, start),
        )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the version of systemd, or a failure if it does not run."""
        expected = "systemd runs the machine" + (
            " and this user's services" if host.scope == "user" else ""
        )
        problem = self.problem_on(host)
        if problem is not None:
            yield self.failed(problem, expected)
        elif host.tools.systemd_running is None:
            yield self.unknown(expected)
        else:
            runs = host.tools.systemd_running
            actual = host.tools.systemd if runs else "it does not run"
            yield self.judge(runs, actual, expected=expected, remedy=_BOOT)


class CgroupVersion(Requirement):
    """The kernel's controllers are in cgroup version 2."""

    name = "cgroup"
    codes = ("cgroup-v1",)

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if the machine has version 1 or the hybrid layout."""
        if facts.probed.tools.cgroup_version == 1:
            yield Problem(
                code="cgroup-v1",
                what="cgroup version 1",
                why="Quadlet needs cgroup version 2; here the controllers are in version 1 "
                "(or hybrid)",
                fix=_boot_with_version_2(facts),
            )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the version."""
        version, expected = host.tools.cgroup_version, "version 2"
        if version is None:
            yield self.unknown(expected)
            return
        problem = self.problem_on(host)
        remedy = (problem.fix if problem else None) or _VERSION_2
        yield self.judge(version == 2, f"version {version}", expected=expected, remedy=remedy)


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


def _boot_with_version_2(facts: LaunchFacts) -> str:
    steps: tuple[str, ...] = ()
    if facts.probed.booted is not False and {"debian", "ubuntu"} & set(facts.probed.families):
        edit = f"""sed -i 's/^GRUB_CMDLINE_LINUX="/&{KERNEL_ARGUMENT} /' /etc/default/grub"""
        steps = (edit, "update-grub", "reboot")
    elif facts.probed.booted is not False and {"fedora", "rhel"} & set(facts.probed.families):
        steps = (f"grubby --update-kernel=ALL --args={KERNEL_ARGUMENT}", "reboot")
    return " && ".join(as_root(facts, step) for step in steps) or _VERSION_2
