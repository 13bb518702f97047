"""The cpuset controller, by which services are bound to CPUs and NUMA nodes."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.accounts import NO_USER
from stackctl.requirements.drop_ins import UserManagerSetting
from stackctl.requirements.facts import LaunchFacts, MachineFacts, StackNeeds
from stackctl.values.host import Host, Problem
from stackctl.values.provision import ItemPlan
from stackctl.values.result import Result


class CpusetController(UserManagerSetting):
    """User managers can set the cpuset controller for their services (Delegate)."""

    name = "cpuset"
    codes = ("cpuset-not-delegated", "cpuset-missing")
    why = "rootless stacks can be bound to CPUs and NUMA nodes only with the cpuset controller"
    file = host_paths.DELEGATE
    directive = "Delegate"
    value = "cpu cpuset io memory pids"
    accepted = ("cpuset", "yes", "true")

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if services of a machine with several NUMA nodes lack the controller."""
        given = facts.probed.tools.cgroup_controllers
        if facts.nodes < 2 or not facts.probed.controllers_known or "cpuset" in given:
            return
        if facts.scope == "system":
            yield Problem(
                code="cpuset-missing",
                what="no cpuset controller",
                why=f"services cannot be bound to one of the {facts.nodes} NUMA nodes without it",
            )
            return
        more, fix = self.cause_and_fix(facts)
        yield Problem(
            code="cpuset-not-delegated",
            what="cpuset is not delegated to user services",
            why=f"without it they cannot be bound to one of the {facts.nodes} NUMA nodes; "
            f"delegated: {' '.join(given) or 'nothing'}{more}",
            fix=fix,
        )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the controllers of services, if the stack may be bound."""
        if (not needs.cpuset and len(host.cpu.numa) < 2) or host.tools.cgroup_version == 1:
            # CgroupVersion reports version 1, whose controllers Quadlet cannot use.
            return
        expected = "services can be bound to CPUs and NUMA nodes (cpuset)"
        if host.tools.cgroup_version is None and not host.tools.cgroup_controllers:
            yield self.unknown(expected)
            return
        given = " ".join(host.tools.cgroup_controllers) or "nothing"
        if "cpuset" in host.tools.cgroup_controllers:
            yield self.result("ok", given, expected=expected)
            return
        problem = self.problem_on(host)
        fix = problem.fix if problem else None
        if problem is None and host.scope == "user":
            fix = self.drop_in_fix()
        yield self.result(
            "fail" if needs.cpuset else "warn", f"delegated: {given}", expected=expected,
            evidence=problem.why if problem else None, remedy=fix,
        )  # fmt: skip

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if no stack is bound to CPUs or the kernel cannot do it; else None."""
        if self.name in needs.named:
            return None
        if facts.user is None:
            return NO_USER
        if not needs.cpuset:
            return "one NUMA node, and no profile binds CPUs"
        if "cpuset" not in facts.root_controllers:
            has = " ".join(facts.root_controllers) or "none"
            return f"this kernel hands on no cpuset controller: {has}"
        return None

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs the drop-in for user managers."""
        user, now = facts.user, None
        if user is not None and user.uid is not None:
            given = user.controllers or user.controllers_next
            now = f"{user.name} has {' '.join(given) or 'nothing'}"
            if "cpuset" in user.controllers_next and not user.stale:
                return self.kept(facts, now)
        return self.install(facts, now)

    def pending(self, facts: MachineFacts) -> str | None:
        """Return the item's name if only the user's next manager will have the controller."""
        user = facts.user
        if user is None:
            return None
        comes = {*user.controllers_next} & {*facts.root_controllers} - {*user.controllers}
        return self.name if self.name in comes else None
