"""The account that runs rootless stacks: its subordinate ids, and lingering, by which its services
start at boot and outlive logins."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from stackctl.requirements.facts import (
    LaunchFacts,
    MachineFacts,
    ProbeUser,
    ServiceUser,
    StackNeeds,
)
from stackctl.requirements.requirement import ProvisionItem, as_root, provision_fix
from stackctl.values.host import Host, Problem
from stackctl.values.provision import AccountChange, ItemPlan, LingerChange, SubidsChange
from stackctl.values.result import Result

#: The reason to skip an item of rootless stacks.
NO_USER = "root runs stacks of the system; rootless ones: --service-user NAME"
#: Size and first id of the range that Debian, Ubuntu and Fedora give the first user; images of
#: containers use ids up to 65535.
_COUNT, _FIRST = 65536, 100_000


class ServiceAccount(ProvisionItem):
    """An account for rootless stacks exists."""

    name = "service-user"
    why = "rootless stacks run as an account with no other rights"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that creates the account."""
        user = facts.user
        if user is None:
            return self.skipped(NO_USER)
        if user.uid is not None:
            return self.already_set(f"{user.name} ({user.uid})")
        change = AccountChange(user=user.name, home=f"/var/lib/{user.name}")
        return self.planned(
            None, "removes the account; its home stays when something is in it", change
        )


class SubordinateIds(ProvisionItem):
    """The user has 65,536 subordinate user and group ids."""

    name = "subids"
    why = "a rootless container's users are mapped to ids of their own"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that adds missing ids."""
        user = facts.user
        if user is None:
            return self.skipped(NO_USER)
        has = _owned(facts.subuid, user), _owned(facts.subgid, user)
        uid = None if has[0] >= _COUNT else _free(facts.subuid)
        gid = None if has[1] >= _COUNT else _free(facts.subgid)
        if uid is None and gid is None:
            return self.already_set(f"{user.name} has {has[0]}")
        change = SubidsChange(user=user.name, uid=uid, gid=gid, count=_COUNT)
        now = f"{user.name} has {has[0]} for users, {has[1]} for groups"
        return self.planned(now, "takes these ids away again", change)


class Lingering(ProvisionItem):
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
        by_hand = 'sudo loginctl enable-linger "$USER"'
        yield self.judge(
            on, "on" if on else "off: they end at logout",
            expected="user services outlive the login session", otherwise="warn",
            evidence=problem.why if problem else None,
            remedy=(problem.fix if problem else None) or provision_fix(self.name, by_hand),
        )  # fmt: skip

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that turns lingering on."""
        user = facts.user
        if user is None:
            return self.skipped(NO_USER)
        if user.lingers:
            return self.already_set(f"on for {user.name}")
        undo = "ends the services of this user when nobody is logged in"
        return self.planned("off", undo, LingerChange(user=user.name))


def enable_linger(user: ProbeUser) -> str:
    """Return the command that turns lingering on for a user."""
    return f"loginctl enable-linger {shlex.quote(user.name or '')}".rstrip()


def _ranges(text: str) -> list[tuple[str, int, int]]:
    """Return owner, first id and count of each line of /etc/subuid or /etc/subgid."""
    found = re.findall(r"^([^:#\s]+):(\d{1,10}):(\d{1,10})$", text, re.MULTILINE)
    return [(owner, int(first), int(count)) for owner, first, count in found]


def _owned(text: str, user: ServiceUser) -> int:
    names = {user.name, str(user.uid)}
    return sum(count for owner, _, count in _ranges(text) if owner in names)


def _free(text: str) -> int:
    """Return the first id of a range that no user has."""
    start = _FIRST
    for _, first, count in sorted(_ranges(text), key=lambda item: item[1]):
        if first < start + _COUNT and start < first + count:
            start = first + count
    return start
