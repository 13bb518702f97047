"""Whether a file may be written: it is absent, or what is there was written by us."""

from __future__ import annotations

import difflib

from stackctl.provision import paths, rivals
from stackctl.provision.facts import Facts
from stackctl.provision.rivals import Rival
from stackctl.values.provision import Change, FileChange, ItemPlan


def shipped_file(facts: Facts, name: str) -> FileChange | None:
    """The change that installs a shipped file; None where it is installed."""
    path = paths.FILES[name]
    text = facts.shipped[name]
    return None if facts.files.get(path) == text else FileChange(path=path, text=text)


def foreign(facts: Facts, item: str, why: str, change: FileChange) -> ItemPlan | None:
    """The refusal, where a file of somebody else's is in the place of ours."""
    there = facts.files.get(change.path)
    if there is None or there == facts.written.get(change.path):
        return None
    said = "changed since stackctl wrote it" if change.path in facts.written else "not stackctl's"
    return ItemPlan(
        item=item,
        status="refused",
        why=why,
        problem=f"{change.path} is {said}:\n{diff(there, change.text)}".rstrip(),
        remedy=f"keep what you need of it, then: sudo rm {change.path}",
    )


def overruled(item: str, why: str, rival: Rival) -> ItemPlan:
    """The refusal, where a line of somebody else's says otherwise."""
    name = "the governor" if rival.key == paths.GOVERNOR_SETTINGS else rival.key
    return ItemPlan(
        item=item,
        status="refused",
        why=why,
        problem=f"{rival.where} sets {name} to {rival.value}, and it is not stackctl's",
        remedy=f"change or remove it ({rival.path}), then again",
    )


def set_already(item: str, why: str, now: str, rival: Rival | None) -> ItemPlan:
    """Nothing to do; by whom, where somebody else saw to it."""
    by = f" ({rival.where})" if rival is not None else ""
    return ItemPlan(item=item, status="ok", why=why, now=now + by)


def diff(before: str, after: str) -> str:
    """What differs, without the lines that name the files."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[2:])


def standing(
    facts: Facts, key: str, name: str, accepted: tuple[str, ...]
) -> tuple[Rival | None, bool]:
    """See rivals.standing: the line of others for a key that a shipped file sets."""
    return rivals.standing(
        facts.rivals, key, paths.FILES[name], lambda value: bool(set(value.split()) & set(accepted))
    )


def skipped(item: str, why: str, reason: str) -> ItemPlan:
    """Nothing that this machine needs, and the reason."""
    return ItemPlan(item=item, status="skip", why=why, now=reason)


def planned(item: str, why: str, now: str | None, undo: str, *changes: Change | None) -> ItemPlan:
    """The changes that are left, or nothing to do."""
    left = tuple(change for change in changes if change is not None)
    if not left:
        return ItemPlan(item=item, status="ok", why=why, now=now)
    return ItemPlan(item=item, status="change", why=why, now=now, changes=left, undo=undo)
