"""The folder for models that every stack may read."""

from __future__ import annotations

from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem
from stackctl.values.provision import FolderChange, ItemPlan


class ModelsFolder(ProvisionItem):
    """The folder for models exists; a new one belongs to the user who runs stacks."""

    name = "models"
    why = "a place for models that services of every user can read"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that creates the folder."""
        if host_paths.MODELS in facts.folders:
            return self.already_set(host_paths.MODELS)
        owner = facts.user.name if facts.user is not None else None
        change = FolderChange(path=host_paths.MODELS, owner=owner)
        return self.planned(None, "removes the folder when it is empty", change)
