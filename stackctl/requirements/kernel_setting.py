"""Requirements on a setting of the kernel, which a file in /etc sets at each boot."""

from __future__ import annotations

from typing import ClassVar

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.requirement import (
    ProvisionItem,
    effective_setting,
    provision_fix,
    shipped_file,
)
from stackctl.values.provision import ItemPlan, SettingChange

#: The reason to skip a setting that root cannot write.
SHARED = "a container has the settings of the machine it runs on: set it there"


class KernelSetting(ProvisionItem):
    """One file below /proc/sys or /sys with a value that suits engines."""

    #: The kernel's file, and the key for it in files in /etc.
    path: ClassVar[str]
    key: ClassVar[str]
    #: The shipped file that sets it at boot, by its name below systemd/.
    file: ClassVar[str]
    value: ClassVar[str]
    #: Values that are kept; one of them is ``value``.
    accepted: ClassVar[tuple[str, ...]]

    def sysctl_fix(self) -> str:
        """Return the fix for a setting that has a name in sysctl."""
        file = host_paths.FILES[self.file]
        by_hand = f"echo '{self.key} = {self.value}' | sudo tee {file} && sudo sysctl --system"
        return provision_fix(self.name, by_hand)

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that sets the value now, and at each boot by a file in /etc."""
        setting = facts.settings.get(self.path)
        if setting is None:
            return self.skipped(f"this kernel has no {self.path}")
        line, stands = effective_setting(facts, self.key, self.file, self.accepted)
        good = setting.value in self.accepted
        if good and (stands or line is None):
            # If the kernel has a good value by itself, no file is needed.
            return self.already_set(setting.value, line)
        if not setting.writable:
            return self.skipped(f"{setting.value}: {SHARED}")
        if line is not None and not stands:
            return self.refuse_conflict(line)
        file = None if stands else shipped_file(facts, self.file)
        if file is not None and (refused := self.refuse_foreign_file(facts, file)):
            return refused
        change = None if good else SettingChange(paths=(self.path,), value=self.value)
        undo = f"removes the file and sets {setting.value} again"
        return self.planned(setting.value, undo, file, change)
