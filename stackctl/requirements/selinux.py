"""SELinux: containers may use a GPU only if a boolean of the policy allows it."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem
from stackctl.values.host import Host
from stackctl.values.provision import ItemPlan
from stackctl.values.result import Result

_ACTUAL = {True: "they may", False: "they may not", None: "SELinux is enforcing"}


class SelinuxDevices(ProvisionItem):
    """The policy lets containers use devices; only the administrator may change the policy."""

    name = "selinux"
    why = "under SELinux containers may use a GPU only where a boolean says so"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the boolean, if SELinux is enforcing."""
        if not needs.gpu or host.tools.selinux != "enforcing":
            return
        may = host.tools.selinux_devices
        yield self.result(
            "ok" if may else "warn",
            _ACTUAL[may],
            expected="containers may use devices (container_use_devices)",
            evidence="the boolean is off unless it was set; see: getsebool container_use_devices"
            if may is None
            else None,
            remedy=None if may else "sudo setsebool -P container_use_devices=true",
        )

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if the boolean has no effect; else None."""
        if not needs.gpu or not facts.host.gpus or facts.host.tools.selinux != "enforcing":
            return "not enforcing, or no GPU is used"
        return None

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:
        """Return a refusal with the command for the administrator, unless the boolean is on."""
        (state,) = self.check(facts.host, needs)
        if state.status == "ok":
            return self.already_set(state.actual or "")
        return self.refused(f"SELinux: {state.actual}", state.remedy)
