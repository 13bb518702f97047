"""Settings of the service managers of users, which a drop-in for all of them fulfils."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from stackctl.quantity import format_bytes
from stackctl.requirements import host_paths
from stackctl.requirements.accounts import NO_USER
from stackctl.requirements.facts import LaunchFacts, MachineFacts, ServiceUser, StackNeeds
from stackctl.requirements.requirement import ShippedSetting, provision_fix
from stackctl.values.host import UNLIMITED, Host, Problem
from stackctl.values.provision import ItemPlan, ReloadChange
from stackctl.values.result import Result, Status

_NO_CAPABILITY = "process 1 lacks CAP_SYS_RESOURCE"


class UserManagerSetting(ShippedSetting):
    """A directive in ``user@.service``; it takes effect in managers that start afterwards."""

    def drop_in_fix(self, *, sudo: str = "sudo ") -> str:
        """Return the fix that installs the drop-in."""
        path = host_paths.FILES[self.file]
        steps = (
            f"{sudo}mkdir -p {path.rpartition('/')[0]}",
            f"printf '[Service]\\n{self.key}={self.value}\\n' | {sudo}tee {path}",
            f"{sudo}systemctl daemon-reload",
        )
        return provision_fix(self.name, f"{' && '.join(steps)}; then log in anew")

    def cause_and_fix(self, facts: LaunchFacts) -> tuple[str, str]:
        """Return an addition to the cause, and the fix.

        The fix installs the drop-in, or restarts the manager if the drop-in is installed.
        """
        path = host_paths.FILES[self.file]
        if path in facts.drop_ins:
            return (
                f"; {path} changes that when the user's service manager starts anew",
                f"stackctl provision --only {self.name} --restart-user\n"
                "# or log out everywhere and in again",
            )
        return "", self.drop_in_fix(sudo="" if facts.probed.user.uid == 0 else "sudo ")

    def lacking(self, host: Host, status: Status, actual: str, *, expected: str) -> Result:
        """Return the finding about services without the setting, with the cause and the fix."""
        problem = self.problem_on(host)
        if problem is not None:
            cause, fix = problem.why, problem.fix
            return self.result(status, actual, expected=expected, evidence=cause, remedy=fix)
        fix = self.drop_in_fix() if host.scope == "user" else None
        return self.result(status, actual, expected=expected, remedy=fix)

    def state(self, user: ServiceUser) -> tuple[str, bool]:
        """Describe the user's setting, and return True if the next manager will have it."""
        raise NotImplementedError

    def pending(self, facts: MachineFacts) -> str | None:
        """Describe the part that only the user's next manager will have; None if there is none."""
        raise NotImplementedError

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs the drop-in, or a refusal."""
        user, now = facts.user, None
        stale = user is not None and user.stale
        if user is not None and user.uid is not None:
            now, comes = self.state(user)
            if comes and not stale:
                line, stands = self.effective_line(facts)
                return self.already_set(now, line if stands else None)
        file = self.file_change(facts)
        if isinstance(file, ItemPlan):
            return file
        reload = ReloadChange() if file is not None or stale else None
        plan = self.planned(now or host_paths.FILES[self.file], "removes the file", file, reload)
        # A running manager keeps its limit and controllers until the next login.
        return plan if plan.status != "change" else msgspec.structs.replace(plan, effect="login")


class CpusetController(UserManagerSetting):
    """User managers can set the cpuset controller, which binds services to CPUs and nodes."""

    name = "cpuset"
    codes = ("cpuset-not-delegated", "cpuset-missing")
    why = "rootless stacks can be bound to CPUs and NUMA nodes only with the cpuset controller"
    file = host_paths.DELEGATE
    key = "Delegate"
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
        given = " ".join(host.tools.cgroup_controllers) or "nothing"
        if host.tools.cgroup_version is None and not host.tools.cgroup_controllers:
            yield self.unknown(expected)
        elif "cpuset" in host.tools.cgroup_controllers:
            yield self.result("ok", given, expected=expected)
        else:
            status: Status = "fail" if needs.cpuset else "warn"
            yield self.lacking(host, status, f"delegated: {given}", expected=expected)

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

    def state(self, user: ServiceUser) -> tuple[str, bool]:
        """Describe the user's controllers, and return True if the next manager has cpuset."""
        given = " ".join(user.controllers or user.controllers_next) or "nothing"
        return f"{user.name} has {given}", "cpuset" in user.controllers_next

    def pending(self, facts: MachineFacts) -> str | None:
        """Return the item's name if only the user's next manager will have the controller."""
        user = facts.user
        if user is None:
            return None
        comes = {*user.controllers_next} & {*facts.root_controllers} - {*user.controllers}
        return self.name if self.name in comes else None


class MemlockLimit(UserManagerSetting):
    """Services may lock as much memory as the model needs, so that it is never paged out."""

    name = "memlock"
    codes = ("memlock-limited", "memlock-unknown")
    why = "a model that is locked in memory is never paged out"
    file = host_paths.MEMLOCK
    key = "LimitMEMLOCK"
    value = "infinity"
    accepted = ("infinity",)

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if the service manager has a limit or an unknown one.

        The fix is None if the limit cannot be raised.
        """
        limit = facts.limits.memlock_bytes
        if limit is None:
            # Without a manager there is no limit to read; SystemdRunning reports the manager.
            if facts.live and facts.probed.tools.systemd_running:
                yield Problem(
                    code="memlock-unknown",
                    what="locked memory limit is unknown",
                    why="the limits of the service manager's process cannot be read",
                )
            return
        if limit == UNLIMITED:
            return
        fixable = facts.scope == "user" and (
            facts.may_raise is not False or limit < (facts.memlock_reachable or 0)
        )
        more, fix = self.cause_and_fix(facts)
        if not fixable:
            more = f"; {_NO_CAPABILITY}, so no setting inside this machine can raise it"
        yield Problem(
            code="memlock-limited",
            what="locked memory is limited",
            why=f"services may lock {format_bytes(limit)} of memory at most{more}",
            fix=fix if fixable else None,
        )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the limit and the memory that the engine locks."""
        limit, wanted = host.limits.memlock_bytes, needs.memlock_bytes
        if wanted is None:
            return
        expected = f"{format_bytes(wanted)} can be locked"
        actual = "no limit" if limit == UNLIMITED else f"{format_bytes(limit or 0)} at most"
        if limit is None:
            yield self.unknown(expected)
        elif limit >= wanted:
            yield self.result("ok", actual, expected=expected)
        else:
            # A warning suffices, because the plan then maps the model without locking it.
            unlocked = f"{actual}: the model stays unlocked"
            yield self.lacking(host, "warn", unlocked, expected=expected)

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if no stack needs the limit or it cannot be raised; else None."""
        user, most = facts.user, facts.memlock_reachable
        if self.name in needs.named:
            return None
        if user is None:
            return NO_USER
        if not needs.memlock:
            return "engines on a GPU lock nothing"
        # A manager that does not run yet will start with the highest limit.
        limit = most if user.memlock_bytes is None else user.memlock_bytes
        if facts.may_raise is False and (limit or 0) >= (most or 0):
            return f"{_NO_CAPABILITY}: no setting inside this machine can raise it"
        return None

    def state(self, user: ServiceUser) -> tuple[str, bool]:
        """Describe the user's limit, and return True if the next manager has none."""
        limit = _amount(user.memlock_bytes)
        return f"{user.name} may lock {limit}", user.memlock_next == UNLIMITED

    def pending(self, facts: MachineFacts) -> str | None:
        """Describe the limit now and after the user's next login; None if that is not higher."""
        user = facts.user
        if user is None or user.memlock_bytes is None:
            return None
        most = UNLIMITED if facts.may_raise else facts.memlock_reachable
        reach = min(user.memlock_next or 0, most or 0)
        if user.memlock_bytes >= reach:
            return None
        return f"{self.name} ({_amount(user.memlock_bytes)} now, {_amount(reach)} then)"


def _amount(limit: int | None) -> str:
    if limit is None:
        return "an unknown amount"
    return "without limit" if limit == UNLIMITED else f"{format_bytes(limit)} at most"
