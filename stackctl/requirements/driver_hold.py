"""The hold of the GPU driver's packages, so that they match the loaded driver."""

from __future__ import annotations

import re

from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem
from stackctl.values.provision import HoldChange, ItemPlan

#: Packages of NVIDIA's driver. If one is newer than the loaded driver, no GPU is found.
_DRIVER = re.compile(
    r"(nvidia-(driver|dkms|kernel|utils|compute|firmware|settings|persistenced|modprobe|open)"
    r"|libnvidia-|xserver-xorg-video-nvidia|cuda-drivers)[\w.+-]*"
)


class DriverHold(ProvisionItem):
    """The GPU's driver is not updated until a person releases its packages."""

    name = "driver-hold"
    why = "an update beside the loaded driver takes the GPU away until the next boot"

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if no GPU is used, or if there is none; else None."""
        if needs.gpu and facts.host.gpus:
            return None
        return "no GPU is used" if facts.host.gpus else "no GPU"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that holds the driver's packages."""
        found = tuple(sorted(n for n in facts.packages or () if _DRIVER.fullmatch(n)))
        if not found:
            return self.skipped("the driver did not come from the distribution's packages")
        loose = tuple(name for name in found if name not in facts.held)
        if not loose:
            return self.already_set(f"{len(found)} packages are held")
        now = f"{len(loose)} packages may be updated at any time"
        return self.planned(now, "releases them", HoldChange(names=loose))
