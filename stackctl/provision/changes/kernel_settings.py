"""Settings of the running kernel in /proc/sys and /sys."""

from __future__ import annotations

import os

from stackctl.errors import StackctlError
from stackctl.provision.changes.kind import ChangeKind
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements.facts import MachineFacts
from stackctl.values.provision import PreviousState, SettingChange, ShownChange


class SettingKind(ChangeKind[SettingChange]):
    """A value in one or more files of the kernel. Before: the values of these files."""

    def before(self, target: TargetRoot, change: SettingChange) -> PreviousState:
        """See ChangeKind."""
        values = []
        for path in change.paths:
            value = target.kernel_value(path)
            if value is None:
                raise _gone(path)
            values.append(value)
        return PreviousState(values=tuple(values))

    def perform(self, target: TargetRoot, change: SettingChange) -> None:
        """See ChangeKind."""
        for path in change.paths:
            _write(target, path, change.value)

    def revert(self, target: TargetRoot, change: SettingChange, old: PreviousState) -> str | None:
        """See ChangeKind."""
        kept = []
        for path, was in zip(change.paths, old.values, strict=True):
            now = target.kernel_value(path)
            if now == change.value:
                _write(target, path, was)
            elif now not in (None, was):
                kept.append(path)
        return f"{' '.join(kept)}: changed since, it stays" if kept else None

    def describe(self, change: SettingChange, facts: MachineFacts) -> ShownChange:
        """See ChangeKind."""
        first, *more = paths = change.paths
        now = sorted({facts.settings[path].value for path in paths if path in facts.settings})
        where = f"{first} and {len(more)} more" if more else first
        return ShownChange(
            what=f"set {where}: {', '.join(now)} -> {change.value}",
            command=None if more else f"echo {change.value} | sudo tee {first}",
        )

    def describe_revert(self, change: SettingChange, old: PreviousState) -> ShownChange:
        """See ChangeKind."""
        first, *more = change.paths
        where = f"{first} and {len(more)} more" if more else first
        was = ", ".join(sorted(set(old.values)))
        return ShownChange(what=f"set {where}: {change.value} -> {was}")


def _write(target: TargetRoot, path: str, value: str) -> None:
    try:
        # Not atomically: a file of the kernel cannot be replaced by another file.
        descriptor = os.open(target.path_of(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(value + "\n")
    except FileNotFoundError:
        raise _gone(path) from None
    except OSError as error:
        raise StackctlError(f"cannot set {path} to {value}: {error.strerror}") from None


def _gone(path: str) -> StackctlError:
    return StackctlError(
        f"{path} is gone since it was looked at",
        hint="a processor or memory node was taken away (see: dmesg); once it is as it should be, "
        "run stackctl provision again: it goes on from here",
    )
