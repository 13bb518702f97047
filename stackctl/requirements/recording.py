"""A recorded machine holds the answers of the commands that the probe runs."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.facts import LaunchFacts
from stackctl.requirements.requirement import Requirement
from stackctl.values.host import Problem


class RecordedCommands(Requirement):
    """No command's answer is missing; on a live machine none can be."""

    name = "recording"
    codes = ("recording-incomplete",)

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield the commands whose answers the recording lacks."""
        if facts.seen.unrecorded:
            yield Problem(
                code="recording-incomplete",
                what="tools: not recorded",
                why=f"the recording holds no answer of {', '.join(facts.seen.unrecorded)}",
            )
