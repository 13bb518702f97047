"""systemd: process 1 runs the machine, and a manager for each user runs its services."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.facts import LaunchFacts, StackNeeds
from stackctl.requirements.linger import enable_linger
from stackctl.requirements.requirement import Requirement, as_root
from stackctl.values.host import Host, Problem
from stackctl.values.result import Result

_BOOT = "boot this machine or container with systemd as process 1"


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
        elif not host.tools.systemd_running:
            yield self.result("fail", "it does not run", expected=expected, remedy=_BOOT)
        else:
            yield self.result("ok", host.tools.systemd, expected=expected)
