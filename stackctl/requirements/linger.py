"""Lingering: the services of a user start at boot and outlive logins."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from stackctl.requirements.accounts import UserItem
from stackctl.requirements.facts import (
    LaunchFacts,
    MachineFacts,
    ProbeUser,
    ServiceUser,
    StackNeeds,
)
from stackctl.requirements.requirement import as_root, provision_fix
from stackctl.values.host import Host, Problem
from stackctl.values.provision import ItemPlan, LingerChange
from stackctl.values.result import Result


def enable_linger(user: ProbeUser) -> str:
    """Return the command that turns lingering on for a user."""
    return f"loginctl enable-linger {shlex.quote(user.name or '')}".rstrip()


class Lingering(UserItem):
    """Lingering is on for the user."""

    name = "linger"
    codes = ("linger-off",)
    why = "without it rootless stacks start at login and end at logout"

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if the user's services end at logout."""
        tools, user = facts.probed.tools, facts.probed.user
        if tools.linger is False and tools.systemd_running is not False:
            yield Problem(
                code="linger-off",
                what="user services end at logout",
                why=f"lingering is off for {user.name}",
                fix=provision_fix(self.name, as_root(facts, enable_linger(user))),
            )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding about the user's lingering."""
        on = host.tools.linger
        if host.scope != "user" or on is None or host.tools.systemd_running is False:
            return
        problem = self.problem_on(host)
        fix = (problem.fix if problem else None) or provision_fix(
            self.name, 'sudo loginctl enable-linger "$USER"'
        )
        yield self.result(
            "ok" if on else "warn",
            "on" if on else "off: they end at logout",
            expected="user services outlive the login session",
            evidence=problem.why if problem else None,
            remedy=None if on else fix,
        )

    def changes_for(self, user: ServiceUser, facts: MachineFacts) -> ItemPlan:  # noqa: ARG002
        """Return the plan that turns lingering on."""
        if user.lingers:
            return self.already_set(f"on for {user.name}")
        undo = "ends the services of this user when nobody is logged in"
        return self.planned("off", undo, LingerChange(user=user.name))
