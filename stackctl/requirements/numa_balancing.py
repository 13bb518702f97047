"""Automatic NUMA balancing: it is turned off, because stackctl plans the nodes of pages."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.kernel_setting import KernelSetting
from stackctl.values.host import Host
from stackctl.values.result import Result


class NumaBalancing(KernelSetting):
    """The kernel does not move pages between NUMA nodes by itself."""

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
        if on is None or nodes < 2:
            return
        yield self.result(
            "warn" if on else "ok",
            "on: the kernel moves pages of the model while it runs" if on else "off",
            expected=f"off: placement over the {nodes} nodes is planned",
            remedy=self.sysctl_fix() if on else None,
        )

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if there is only one node; else None."""
        if len(facts.host.cpu.numa) < 2 and self.name not in needs.named:
            return "one NUMA node: nothing to balance"
        return None
