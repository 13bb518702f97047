"""The base of all requirements: one class for one property that a host must have."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import ClassVar

from stackctl.requirements import host_paths
from stackctl.requirements.facts import ForeignSetting, LaunchFacts, MachineFacts, StackNeeds
from stackctl.values.host import Host, Problem, ProblemCode
from stackctl.values.provision import Change, FileChange, ItemPlan
from stackctl.values.result import Result, Status

#: The beginnings of problems in documents from before problems had codes. They never change.
_TEXTS_WITHOUT_CODE: tuple[tuple[str, ProblemCode], ...] = (
    ("podman is not installed", "podman-missing"),
    ("podman does not answer", "podman-no-answer"),
    ("podman ", "podman-too-old"),
    ("no Quadlet generator", "quadlet-missing"),
    ("systemd is not running", "systemd-not-running"),
    ("no service manager", "user-manager-not-running"),
    ("cgroup version 1", "cgroup-v1"),
    ("user services end", "linger-off"),
    ("no cpuset controller", "cpuset-missing"),
    ("cpuset is not delegated", "cpuset-not-delegated"),
    ("locked memory limit is unknown", "memlock-unknown"),
    ("locked memory is limited", "memlock-limited"),
    ("tools: not recorded", "recording-incomplete"),
)


def code_of(problem: Problem) -> ProblemCode | None:
    """Return the code of a problem; derive it from the text if the document has no codes."""
    if problem.code is not None:
        return problem.code
    return next((code for text, code in _TEXTS_WITHOUT_CODE if problem.what.startswith(text)), None)


class Requirement:
    """One property that a host must have, with its problems and its findings in ``doctor``.

    A subclass overrides ``problems``, ``check`` or both.
    """

    #: The name of its findings, and of its provisioning item if it has one.
    name: ClassVar[str]
    #: Codes of the problems that ``problems`` yields; ``check`` judges them.
    codes: ClassVar[tuple[ProblemCode, ...]] = ()

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:  # noqa: ARG002
        """Yield the problems that a launch would meet, with their fixes."""
        yield from ()

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield the findings of ``doctor`` for a stack with these needs."""
        yield from ()

    def problem_on(self, host: Host) -> Problem | None:
        """Return the problem of this requirement that the probe found; None if there is none."""
        return next((found for found in host.problems if code_of(found) in self.codes), None)

    def result(
        self,
        status: Status,
        actual: str | None,
        *,
        expected: str | None = None,
        evidence: str | None = None,
        remedy: str | None = None,
    ) -> Result:
        """Return a finding with the name of this requirement."""
        return Result(
            name=self.name, status=status, expected=expected, actual=actual, evidence=evidence,
            remedy=remedy,
        )  # fmt: skip

    def judge(
        self,
        good: bool,
        actual: str | None,
        *,
        expected: str,
        otherwise: Status = "fail",
        evidence: str | None = None,
        remedy: str | None,
    ) -> Result:
        """Return a finding without a remedy if all is good, otherwise one with this status."""
        if good:
            return self.result("ok", actual, expected=expected)
        return self.result(otherwise, actual, expected=expected, evidence=evidence, remedy=remedy)

    def unknown(self, expected: str) -> Result:
        """Return the finding for a fact that could not be read."""
        return self.result("skip", "unknown", expected=expected)

    def failed(self, problem: Problem, expected: str) -> Result:
        """Return the finding for a problem of the probe that keeps a stack from starting."""
        return self.result(
            "fail", problem.what, expected=expected, evidence=problem.why, remedy=problem.fix
        )


class ProvisionItem(Requirement):
    """A requirement that ``stackctl provision`` can fulfil."""

    #: The reason why a machine needs it, for the list of items.
    why: ClassVar[str]

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:  # noqa: ARG002
        """Return the reason why this machine does not need it; None if it does."""
        return None

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:
        """Return the plan for a machine that needs the item: changes, or why there are none."""
        raise NotImplementedError

    def plan(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:
        """Return the plan for this machine: changes, or the reason why there are none."""
        reason = self.unneeded(facts, needs)
        return self.changes(facts, needs) if reason is None else self.skipped(reason)

    def skipped(self, reason: str) -> ItemPlan:
        """Return the plan of an item that this machine does not need or cannot have."""
        return ItemPlan(item=self.name, status="skip", why=self.why, now=reason)

    def already_set(self, now: str, by: ForeignSetting | None = None) -> ItemPlan:
        """Return the plan of a fulfilled item; ``by`` is a foreign line that fulfils it."""
        where = f" ({by.where})" if by is not None else ""
        return ItemPlan(item=self.name, status="ok", why=self.why, now=now + where)

    def refused(self, problem: str, remedy: str | None) -> ItemPlan:
        """Return the plan of an item that stackctl does not change, with the remedy."""
        return ItemPlan(
            item=self.name, status="refused", why=self.why, problem=problem, remedy=remedy
        )

    def planned(self, now: str | None, undo: str, *changes: Change | None) -> ItemPlan:
        """Return the plan with these changes, without Nones; with no changes it is fulfilled."""
        left = tuple(change for change in changes if change is not None)
        if not left:
            return ItemPlan(item=self.name, status="ok", why=self.why, now=now)
        return ItemPlan(
            item=self.name, status="change", why=self.why, now=now, changes=left, undo=undo
        )

    def refuse_foreign_file(self, facts: MachineFacts, change: FileChange) -> ItemPlan | None:
        """Return a refusal if another file than stackctl's is at the path; else None."""
        there = facts.files.get(change.path)
        if there is None or there == facts.written.get(change.path):
            return None
        edited = change.path in facts.written
        state = "changed since stackctl wrote it" if edited else "not stackctl's"
        return self.refused(
            f"{change.path} is {state}:\n{diff(there, change.text)}".rstrip(),
            f"keep what you need of it, then: sudo rm {change.path}",
        )


def shipped_file(facts: MachineFacts, name: str) -> FileChange | None:
    """Return the change that installs a shipped file; None if it is installed."""
    path = host_paths.FILES[name]
    text = facts.shipped[name]
    return None if facts.files.get(path) == text else FileChange(path=path, text=text)


class ShippedSetting(ProvisionItem):
    """A value that a shipped file in /etc sets."""

    #: The shipped file, by its name below systemd/, and the key and value in it.
    file: ClassVar[str]
    key: ClassVar[str]
    value: ClassVar[str]
    #: Values in other files that fulfil the requirement too.
    accepted: ClassVar[tuple[str, ...]]

    def effective_line(self, facts: MachineFacts) -> tuple[ForeignSetting | None, bool]:
        """Return the foreign line that takes effect, and True if its value is accepted.

        (line, False) means a conflict: a person or program of this machine wrote the line, or its
        file is read after the shipped file, so stackctl must not overrule it. (None, False) means
        that the shipped file decides.
        """
        own = host_paths.FILES[self.file].rpartition("/")[2]
        lines = (line for line in facts.foreign if line.key == self.key)
        last = max(lines, key=lambda line: line.name, default=None)
        if last is None:
            return None, False
        if set(last.value.split()) & set(self.accepted):
            return last, True
        return (last, False) if last.local or last.name > own else (None, False)

    def file_change(self, facts: MachineFacts) -> FileChange | ItemPlan | None:
        """Return the change that installs the file, a refusal, or None if it is not needed."""
        line, stands = self.effective_line(facts)
        if line is not None and not stands:
            name = "the governor" if line.key == host_paths.GOVERNOR_SETTINGS else line.key
            return self.refused(
                f"{line.where} sets {name} to {line.value}, and it is not stackctl's",
                f"change or remove it ({line.path}), then again",
            )
        file = None if stands else shipped_file(facts, self.file)
        return file and (self.refuse_foreign_file(facts, file) or file)


def diff(before: str, after: str) -> str:
    """Return a unified diff of two texts, without the lines that name the files."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[2:])


def provision_fix(item: str, by_hand: str | None = None) -> str:
    """Return the command by which stackctl fulfils an item, and the manual one as a comment."""
    fix = f"stackctl provision --only {item}"
    return fix if by_hand is None else f"{fix}\n# by hand: {by_hand}"


def as_root(facts: LaunchFacts, command: str) -> str:
    """Return a command with sudo, unless the probe runs as root."""
    return command if facts.probed.user.uid == 0 else f"sudo {command}"
