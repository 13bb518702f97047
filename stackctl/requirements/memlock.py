"""Locked memory: an engine locks its model so that it is never paged out."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.quantity import format_bytes
from stackctl.requirements import host_paths
from stackctl.requirements.accounts import NO_USER
from stackctl.requirements.drop_ins import UserManagerSetting
from stackctl.requirements.facts import LaunchFacts, MachineFacts, StackNeeds
from stackctl.values.host import UNLIMITED, Host, Problem
from stackctl.values.provision import ItemPlan
from stackctl.values.result import Result

_NO_CAPABILITY = "process 1 lacks CAP_SYS_RESOURCE"


class MemlockLimit(UserManagerSetting):
    """Services may lock as much memory as the model needs (LimitMEMLOCK)."""

    name = "memlock"
    codes = ("memlock-limited", "memlock-unknown")
    why = "a model that is locked in memory is never paged out"
    file = host_paths.MEMLOCK
    directive = "LimitMEMLOCK"
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
        if limit is None:
            yield self.unknown(expected)
            return
        actual = "no limit" if limit == UNLIMITED else f"{format_bytes(limit)} at most"
        if limit >= wanted:
            yield self.result("ok", actual, expected=expected)
            return
        problem = self.problem_on(host)
        fix = problem.fix if problem else None
        if problem is None and host.scope == "user":
            fix = self.drop_in_fix()
        # A warning suffices, because the plan then maps the model without locking it.
        yield self.result(
            "warn", f"{actual}: the model stays unlocked", expected=expected,
            evidence=problem.why if problem else None, remedy=fix,
        )  # fmt: skip

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

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs the drop-in for user managers."""
        user, now = facts.user, None
        if user is not None and user.uid is not None:
            now = f"{user.name} may lock {_amount(user.memlock_bytes)}"
            if user.memlock_next == UNLIMITED and not user.stale:
                return self.kept(facts, now)
        return self.install(facts, now)

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
