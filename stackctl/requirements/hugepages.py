"""Transparent huge pages for programs that request them."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.kernel_setting import KernelSetting
from stackctl.requirements.requirement import provision_fix
from stackctl.values.host import Host
from stackctl.values.result import Result


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
        if mode is None:
            return
        always = mode == "always"
        by_hand = f"echo {self.value} | sudo tee {self.path}"
        yield self.result(
            "info" if always else "ok",
            mode,
            expected="madvise, or any",
            evidence="good for engines; other programs may use more memory than they ask for"
            if always
            else None,
            remedy=provision_fix(self.name, by_hand) if always else None,
        )
