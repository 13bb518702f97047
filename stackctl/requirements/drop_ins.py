"""Requirements that a drop-in for the service managers of all users fulfils."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from stackctl.requirements import host_paths
from stackctl.requirements.facts import LaunchFacts, MachineFacts
from stackctl.requirements.requirement import (
    ProvisionItem,
    effective_setting,
    provision_fix,
    shipped_file,
)
from stackctl.values.provision import ItemPlan, ReloadChange


class UserManagerSetting(ProvisionItem):
    """A directive in ``user@.service``; it takes effect in managers that start afterwards."""

    #: The shipped file, by its name below systemd/, and the line that it holds.
    file: ClassVar[str]
    directive: ClassVar[str]
    value: ClassVar[str]
    #: Values in other files that fulfil the requirement too.
    accepted: ClassVar[tuple[str, ...]]

    def drop_in_fix(self, *, sudo: str = "sudo ") -> str:
        """Return the fix that installs the drop-in."""
        path = host_paths.FILES[self.file]
        steps = (
            f"{sudo}mkdir -p {path.rpartition('/')[0]}",
            f"printf '[Service]\\n{self.directive}={self.value}\\n' | {sudo}tee {path}",
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
        sudo = "" if facts.probed.user.uid == 0 else "sudo "
        return "", self.drop_in_fix(sudo=sudo)

    def pending(self, facts: MachineFacts) -> str | None:
        """Describe the part that only the user's next manager will have; None if there is none."""
        raise NotImplementedError

    def kept(self, facts: MachineFacts, now: str) -> ItemPlan:
        """Return the plan of a fulfilled item: the user's next manager has the setting."""
        line, stands = effective_setting(facts, self.directive, self.file, self.accepted)
        return self.already_set(now, line if stands else None)

    def install(self, facts: MachineFacts, now: str | None) -> ItemPlan:
        """Return the plan that installs the drop-in, or a refusal."""
        line, stands = effective_setting(facts, self.directive, self.file, self.accepted)
        if line is not None and not stands:
            return self.refuse_conflict(line)
        file = None if stands else shipped_file(facts, self.file)
        if file is not None and (refused := self.refuse_foreign_file(facts, file)):
            return refused
        stale = facts.user is not None and facts.user.stale
        reload = ReloadChange() if file is not None or stale else None
        plan = self.planned(now or host_paths.FILES[self.file], "removes the file", file, reload)
        # A running manager keeps its limit and controllers until the next login.
        return plan if plan.status != "change" else msgspec.structs.replace(plan, effect="login")
