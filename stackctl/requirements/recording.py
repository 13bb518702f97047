"""The recording of a machine: it holds the output of the commands that the probe runs."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.facts import LaunchFacts
from stackctl.requirements.requirement import Requirement
from stackctl.values.host import Problem


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
