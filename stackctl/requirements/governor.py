"""The frequency governor: "performance" on every processor."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, SettingValue, StackNeeds
from stackctl.requirements.kernel_setting import SHARED
from stackctl.requirements.requirement import (
    ProvisionItem,
    effective_setting,
    provision_fix,
    shipped_file,
)
from stackctl.values.host import Host
from stackctl.values.provision import ItemPlan, SettingChange
from stackctl.values.result import Result

_GOOD = "performance"


class FrequencyGovernor(ProvisionItem):
    """Processors keep their frequency between requests."""

    name = "governor"
    why = "processors that slow down between requests answer the next one late"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the governor and its driver."""
        governor = host.cpu.governor
        if governor is None:
            return
        good = governor == _GOOD
        driver = f" ({host.cpu.governor_driver})" if host.cpu.governor_driver else ""
        files = host_paths.GOVERNOR_SETTINGS.replace("[0-9]", "")
        yield self.result(
            "ok" if good else "warn",
            governor + driver,
            expected=_GOOD,
            remedy=None if good else provision_fix(self.name, f"echo {_GOOD} | sudo tee {files}"),
        )

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:  # noqa: ARG002
        """Return the reason if the machine has no governors; else None."""
        if _governors(facts):
            return None
        return "this machine does not let its kernel choose the frequency"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that sets the governors now, and at each boot by a file in /etc."""
        governors = _governors(facts)
        now = ", ".join(sorted({setting.value for setting in governors.values()}))
        slow = tuple(path for path, setting in governors.items() if setting.value != _GOOD)
        if any(not governors[path].writable for path in slow):
            return self.skipped(f"{now}: {SHARED}")
        line, stands = effective_setting(
            facts, host_paths.GOVERNOR_SETTINGS, host_paths.GOVERNOR, (_GOOD,)
        )
        if not slow and (stands or line is None):
            return self.already_set(_GOOD, line)
        if line is not None and not stands:
            return self.refuse_conflict(line)
        file = None if stands else shipped_file(facts, host_paths.GOVERNOR)
        if file is not None and (refused := self.refuse_foreign_file(facts, file)):
            return refused
        setting = SettingChange(paths=slow, value=_GOOD) if slow else None
        return self.planned(now, "removes the file and puts the governors back", file, setting)


def _governors(facts: MachineFacts) -> dict[str, SettingValue]:
    return {
        path: setting
        for path, setting in facts.settings.items()
        if path.endswith("/scaling_governor")
    }
