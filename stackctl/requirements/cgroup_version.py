"""cgroup version 2: Quadlet and rootless limits need its unified hierarchy."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.facts import LaunchFacts, StackNeeds
from stackctl.requirements.requirement import Requirement, as_root
from stackctl.values.host import Host, Problem
from stackctl.values.result import Result

#: The kernel argument that selects version 2 at boot.
KERNEL_ARGUMENT = "systemd.unified_cgroup_hierarchy=1"
_FIX = f"add {KERNEL_ARGUMENT} to the kernel command line and reboot"


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
        elif version == 2:
            yield self.result("ok", f"version {version}", expected=expected)
        else:
            problem = self.problem_on(host)
            remedy = (problem.fix if problem else None) or _FIX
            yield self.result("fail", f"version {version}", expected=expected, remedy=remedy)


def _boot_with_version_2(facts: LaunchFacts) -> str:
    steps: tuple[str, ...] = ()
    if facts.probed.booted is not False and {"debian", "ubuntu"} & set(facts.probed.families):
        edit = f"""sed -i 's/^GRUB_CMDLINE_LINUX="/&{KERNEL_ARGUMENT} /' /etc/default/grub"""
        steps = (edit, "update-grub", "reboot")
    elif facts.probed.booted is not False and {"fedora", "rhel"} & set(facts.probed.families):
        steps = (f"grubby --update-kernel=ALL --args={KERNEL_ARGUMENT}", "reboot")
    return " && ".join(as_root(facts, step) for step in steps) or _FIX
