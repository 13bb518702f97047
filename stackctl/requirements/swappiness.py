"""Swappiness: low, so that engines stay in memory under pressure."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.kernel_setting import KernelSetting
from stackctl.values.host import Host
from stackctl.values.result import Result

#: The highest value that is accepted.
_HIGHEST = 30


class Swappiness(KernelSetting):
    """The kernel swaps little."""

    name = "swappiness"
    why = "an engine whose pages were swapped out answers late"
    path = host_paths.SWAPPINESS_SETTING
    key = "vm.swappiness"
    file = host_paths.SWAPPINESS
    value = "10"
    accepted = tuple(str(number) for number in range(_HIGHEST + 1))

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the value. Locked memory is never swapped, so any value is good."""
        swappiness = host.tools.swappiness
        if swappiness is None:
            return
        high = swappiness > _HIGHEST and needs.memlock_bytes is None
        yield self.result(
            "info" if high else "ok",
            str(swappiness),
            expected=f"{_HIGHEST} or less, or the model locked in memory",
            remedy=self.sysctl_fix() if high else None,
        )

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if the machine has no swap; else None."""
        return "no swap" if not facts.swap and self.name not in needs.named else None
