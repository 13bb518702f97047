"""Packages of the distribution."""

from __future__ import annotations

from stackctl.provision import apt
from stackctl.provision.changes.files import remove_folders
from stackctl.provision.changes.kind import ChangeKind
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements.facts import MachineFacts
from stackctl.values.provision import HoldChange, PackagesChange, PreviousState, ShownChange

#: Folders that Podman's package makes at each boot (its tmpfiles.d), and leaves when it is removed.
_AT_BOOT = ("/var/lib/cni/networks", "/var/lib/cni")


class PackagesKind(ChangeKind[PackagesChange]):
    """Packages to install. Before: the packages to be added, and folders that they will make."""

    def before(self, target: TargetRoot, change: PackagesChange) -> PreviousState:
        """See ChangeKind."""
        absent = tuple(path for path in _AT_BOOT if not target.exists(path))
        return PreviousState(names=apt.packages_to_install(change.names), folders=absent)

    def perform(self, target: TargetRoot, change: PackagesChange) -> None:  # noqa: ARG002
        """See ChangeKind."""
        apt.install_packages(change.names)

    def revert(self, target: TargetRoot, change: PackagesChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        text = target.read("/var/lib/dpkg/status") or ""
        here = {line.removeprefix("Package: ") for line in text.splitlines() if "Package: " in line}
        left = [name for name in old.names if name in here]
        if left:
            others = apt.reverse_dependencies(left)
            if others:
                return f"{' '.join(others)}, installed since, need them: they stay"
            apt.remove_packages(left)
        return remove_folders(target, old.folders)

    def describe(self, change: PackagesChange, facts: MachineFacts) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        brought = change.all_names
        more = f", {len(brought)} packages in all: {' '.join(brought)}" if brought else ""
        return ShownChange(
            what=f"install {' '.join(change.names)}{more}",
            command=f"apt-get install --no-install-recommends {' '.join(change.names)}",
        )

    def describe_revert(self, change: PackagesChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"remove the packages {' '.join(old.names)}")


class HoldKind(ChangeKind[HoldChange]):
    """Packages that apt keeps at their version."""

    def perform(self, target: TargetRoot, change: HoldChange) -> None:  # noqa: ARG002
        """See ChangeKind."""
        apt.hold_packages(change.names)

    def revert(self, target: TargetRoot, change: HoldChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        apt.unhold_packages(change.names)
        return None

    def describe(self, change: HoldChange, facts: MachineFacts) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what="hold", command=f"apt-mark hold {' '.join(change.names)}")

    def describe_revert(self, change: HoldChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what="release", command=f"apt-mark unhold {' '.join(change.names)}")
