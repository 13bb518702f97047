"""Settings of the kernel that suit engines, each set at boot by a file in /etc."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import ClassVar

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, SettingValue, StackNeeds
from stackctl.requirements.requirement import ShippedSetting, provision_fix
from stackctl.values.host import Host
from stackctl.values.provision import ItemPlan, SettingChange
from stackctl.values.result import Result

_HIGHEST_SWAPPINESS = 30


class KernelSetting(ShippedSetting):
    """Files below /proc/sys or /sys with a value that suits engines."""

    #: The pattern of the kernel's files.
    path: ClassVar[str]
    undo: ClassVar[str] = "removes the file and sets {now} again"

    def sysctl_fix(self) -> str:
        """Return the fix for a setting that has a name in sysctl."""
        file = host_paths.FILES[self.file]
        by_hand = f"echo '{self.key} = {self.value}' | sudo tee {file} && sudo sysctl --system"
        return provision_fix(self.name, by_hand)

    def present(self, facts: MachineFacts) -> dict[str, SettingValue]:
        """Return the values of the kernel's files, by path."""
        found = facts.settings.items()
        return {path: setting for path, setting in found if fnmatchcase(path, self.path)}

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that sets the value now, and at each boot by a file in /etc."""
        present = self.present(facts)
        if not present:
            return self.skipped(f"this kernel has no {self.path}")
        now = ", ".join(sorted({setting.value for setting in present.values()}))
        bad = tuple(path for path, one in present.items() if one.value not in self.accepted)
        line, stands = self.effective_line(facts)
        if not bad and (stands or line is None):
            # If the kernel has a good value by itself, no file is needed.
            return self.already_set(now, line)
        if not all(setting.writable for setting in present.values()):
            where = "a container has the settings of the machine it runs on: set it there"
            return self.skipped(f"{now}: {where}")
        file = self.file_change(facts)
        if isinstance(file, ItemPlan):
            return file
        setting = SettingChange(paths=bad, value=self.value) if bad else None
        return self.planned(now, self.undo.format(now=now), file, setting)


class NumaBalancing(KernelSetting):
    """The kernel does not move pages between NUMA nodes by itself; stackctl plans their nodes."""

    name = "numa-balancing"
    why = "the kernel would move pages of a model while it is read"
    path = host_paths.NUMA_SETTING
    key = "kernel.numa_balancing"
    file = host_paths.NUMA
    value = "0"
    accepted = ("0",)

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding about balancing, if there are several nodes."""
        on, nodes = host.tools.numa_balancing, len(host.cpu.numa)
        if on is not None and nodes > 1:
            yield self.judge(
                not on, "on: the kernel moves pages of the model while it runs" if on else "off",
                expected=f"off: placement over the {nodes} nodes is planned",
                otherwise="warn", remedy=self.sysctl_fix(),
            )  # fmt: skip

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if there is only one node; else None."""
        if len(facts.host.cpu.numa) < 2 and self.name not in needs.named:
            return "one NUMA node: nothing to balance"
        return None


class Swappiness(KernelSetting):
    """The kernel swaps little, so that engines stay in memory under pressure."""

    name = "swappiness"
    why = "an engine whose pages were swapped out answers late"
    path = host_paths.SWAPPINESS_SETTING
    key = "vm.swappiness"
    file = host_paths.SWAPPINESS
    value = "10"
    accepted = tuple(str(number) for number in range(_HIGHEST_SWAPPINESS + 1))

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the value. Locked memory is never swapped, so any value is good."""
        value = host.tools.swappiness
        if value is not None:
            yield self.judge(
                value <= _HIGHEST_SWAPPINESS or needs.memlock_bytes is not None, str(value),
                expected=f"{_HIGHEST_SWAPPINESS} or less, or the model locked in memory",
                otherwise="info", remedy=self.sysctl_fix(),
            )  # fmt: skip

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if the machine has no swap; else None."""
        return "no swap" if not facts.swap and self.name not in needs.named else None


class TransparentHugepages(KernelSetting):
    """The kernel gives huge pages on request; "never" is kept, because a person chose it."""

    name = "transparent-hugepages"
    why = "engines ask for huge pages; programs that do not would take more memory than they need"
    path = host_paths.HUGEPAGES_SETTING
    key = host_paths.HUGEPAGES_SETTING
    file = host_paths.HUGEPAGES
    value = "madvise"
    accepted = ("madvise", "never")

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the mode."""
        mode = host.memory.transparent_hugepages
        if mode is not None:
            by_hand = f"echo {self.value} | sudo tee {self.path}"
            yield self.judge(
                mode != "always", mode, expected="madvise, or any", otherwise="info",
                evidence="good for engines; other programs may use more memory than they ask for",
                remedy=provision_fix(self.name, by_hand),
            )  # fmt: skip


class FrequencyGovernor(KernelSetting):
    """Processors keep their frequency between requests."""

    name = "governor"
    why = "processors that slow down between requests answer the next one late"
    path = host_paths.GOVERNOR_SETTINGS
    key = host_paths.GOVERNOR_SETTINGS
    file = host_paths.GOVERNOR
    value = "performance"
    accepted = ("performance",)
    undo = "removes the file and puts the governors back"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the governor and its driver."""
        governor = host.cpu.governor
        if governor is not None:
            driver = f" ({host.cpu.governor_driver})" if host.cpu.governor_driver else ""
            by_hand = f"echo {self.value} | sudo tee {self.path.replace('[0-9]', '')}"
            yield self.judge(
                governor == self.value, governor + driver, expected=self.value, otherwise="warn",
                remedy=provision_fix(self.name, by_hand),
            )  # fmt: skip

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:  # noqa: ARG002
        """Return the reason if the machine has no governors; else None."""
        if self.present(facts):
            return None
        return "this machine does not let its kernel choose the frequency"
