"""stackctl itself: its recordings of machines, a copy that only root can change, a timer, and the
folder for models."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import host_paths
from stackctl.requirements.facts import LaunchFacts, MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem, Requirement
from stackctl.values.host import Problem
from stackctl.values.provision import FolderChange, GuardChange, ItemPlan, ProgramChange


class RecordedCommands(Requirement):
    """The recording has the output of every command; a live machine always fulfils this."""

    name = "recording"
    codes = ("recording-incomplete",)

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem with the commands whose output the recording lacks."""
        if facts.probed.unrecorded:
            yield Problem(
                code="recording-incomplete",
                what="tools: not recorded",
                why=f"the recording holds no answer of {', '.join(facts.probed.unrecorded)}",
            )


class InstalledProgram(ProvisionItem):
    """stackctl is in the search path of all users, and only root can change it."""

    name = "stackctl"
    why = "sudo, timers and other users find it, and only root can change it"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs this version of stackctl, or a refusal."""
        weakness = facts.program_weakness
        if facts.program is not None and not facts.program_ours:
            if weakness is None:
                return self.already_set(facts.program)
            return self.refused(
                f"{facts.program} is not stackctl's: {weakness}",
                f"sudo rm {facts.program}, then again",
            )
        if weakness is not None and not facts.program_replaceable:
            return self.refused(
                f"other users can change {facts.program}: {weakness}",
                "make root its owner and only writer (chown root:root, chmod go-w), then again",
            )
        if facts.program is not None and facts.program_current and weakness is None:
            return self.already_set(facts.program)
        if facts.python_weakness is not None:
            return self.refused(
                f"the Python that runs this could be changed: {facts.python_weakness}",
                "make the virtual environment of stackctl with the system's python3, then again",
            )
        if facts.program is None:
            now = "not in root's search path"
        elif weakness is not None:
            now = f"{facts.program}, which other users can change: {weakness}"
        else:
            now = f"{facts.program}, another version"
        change = ProgramChange(folder=host_paths.PROGRAM_FOLDER, link=host_paths.LINK)
        return self.planned(now, f"removes {host_paths.PROGRAM_FOLDER} and the link", change)


class GuardTimer(ProvisionItem):
    """A timer checks stacks every minute."""

    name = "guard"
    why = "every minute stacks are checked, and an engine that is dead is restarted"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs the timer."""
        user = facts.user
        if user.guarded if user is not None else facts.guarded:
            return self.already_set("on")
        change = GuardChange(
            user=user.name if user is not None else None, program=facts.program or host_paths.LINK
        )
        whose = f"stacks of {user.name}" if user is not None else "stacks of the system"
        return self.planned(f"off for {whose}", "stops and removes the timer", change)


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
