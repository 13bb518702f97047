"""Make and revert planned changes.

Each change is recorded before it is made, in a file that only its owner can read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import msgspec

from stackctl.deploy.context import StepProgress
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner
from stackctl.machine.files import remove_file, write_atomically
from stackctl.machine.lock import record_lock_holder
from stackctl.machine.signals import defer_signals
from stackctl.provision import apt, changes
from stackctl.provision.changes import account
from stackctl.provision.target_root import TargetRoot
from stackctl.quantity import format_bytes
from stackctl.values.base import from_json, to_json
from stackctl.values.provision import (
    Change,
    FileChange,
    GuardChange,
    HoldChange,
    ItemPlan,
    LingerChange,
    PackagesChange,
    ProgramChange,
    RecordedChange,
    ReloadChange,
    RestartChange,
    UndoRecord,
)

_AGAIN = "finished changes are on record: stackctl provision continues, --undo reverts them"
_STAYS = "it stays to take back the rest later; all the same: --undo --only stackctl"
#: Items without which a running stack would stop, or could not start again.
_CARRYING = frozenset({"podman", "service-user", "subids", "linger", "cdi"})
_MIB = 2**20
#: apt and dpkg hold this lock while they change packages.
_DPKG_LOCK = "/var/lib/dpkg/lock-frontend"
#: Podman with its dependencies takes about 130 MiB on Debian 13, and its archives come on top.
_PACKAGES, _PROGRAM, _FILES = 500 * _MIB, 64 * _MIB, _MIB
#: One path for all users, because the recorded changes are those of the machine.
PATH = "/var/lib/stackctl/provision.json"


class UndoStore:
    """The record on disk. A change is added to it before it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> UndoRecord:
        """Return the recorded changes; an empty record if there is no file.

        Raises:
            StackctlError: the file is damaged or may not be read.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return UndoRecord()
        except OSError as error:
            raise StackctlError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            return from_json(text, UndoRecord, where=str(self.path))
        except StackctlError as error:
            raise StackctlError(
                "the record of provisioning cannot be read",
                details=(error.message,),
                hint=f"--undo needs it; to begin a new one: mv {self.path} {self.path}.old",
            ) from None

    def add(self, new: RecordedChange) -> None:
        """Record a change that begins. If it repeats one on record, that one's ``before`` stays."""
        found = list(self.read().changes)
        for place, known in enumerate(found):
            if _change_key(known.change) == _change_key(new.change):
                found[place] = msgspec.structs.replace(known, change=new.change)
                break
        else:
            found.append(new)
        self._write(found)

    def drop(self, gone: RecordedChange) -> None:
        """Remove a reverted change from the record; remove the file with the last change."""
        left = [
            one
            for one in self.read().changes
            if _change_key(one.change) != _change_key(gone.change)
        ]
        if left:
            self._write(left)
        else:
            remove_file(self.path)
            # The folder is removed too if it is empty.
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def _write(self, changes: Iterable[RecordedChange]) -> None:
        write_atomically(self.path, to_json(UndoRecord(changes=tuple(changes))), mode=0o600)


def _change_key(change: Change) -> Hashable:
    """Return a key that is equal for two changes of the same thing.

    A file, for example, is the same if its path is, whatever its text.
    """
    match change:
        case FileChange(path=path):
            return "file", path
        case ProgramChange(folder=folder):
            return "program", folder
        case GuardChange(user=user):
            return "guard", user
        case PackagesChange(names=names):
            return "packages", names
        case _:
            return change


def require_ready(target: TargetRoot, plans: Sequence[ItemPlan]) -> None:
    """Check free space, read-only file systems and the package manager's lock.

    Raises:
        StackctlError: exit 6, with the remedy, if a change could not be made.
    """
    planned = [change for plan in plans for change in plan.changes]
    wanted = {"/etc": _FILES, PATH.rpartition("/")[0]: _FILES}
    if any(isinstance(change, PackagesChange) for change in planned):
        wanted |= {"/usr": _PACKAGES, "/var": _PACKAGES}
    if any(isinstance(change, ProgramChange) for change in planned):
        wanted["/usr/local"] = _PROGRAM
    for folder, least in wanted.items():
        _require_room(target, folder, least)
    if any(isinstance(change, PackagesChange | HoldChange) for change in planned):
        _require_no_other(target)


def _require_no_other(target: TargetRoot) -> None:
    """Refuse to start while another program installs packages: the user decides to wait."""
    pid = record_lock_holder(target.path_of(_DPKG_LOCK))
    if pid is not None:
        name = (target.read(f"/proc/{pid}/comm") or "").strip()
        raise StackctlError(
            "the package manager is at work: "
            + (f"process {pid} ({name})" if pid > 0 else "a process outside this container"),
            hint="wait until it is done (unattended upgrades may take minutes), then again",
            exit_code=ExitCode.HOST,
        )


def _require_room(target: TargetRoot, folder: str, least: int) -> None:
    place = target.path_of(folder)
    while not place.exists():
        place = place.parent
    seen = os.statvfs(place)
    if seen.f_flag & os.ST_RDONLY:
        raise StackctlError(
            f"the file system of {folder} is read-only",
            hint="see why (dmesg; an image-based system has its own tools), then: "
            f"sudo mount -o remount,rw {'/' if folder != '/etc' else folder}",
            exit_code=ExitCode.HOST,
        )
    free = seen.f_bavail * seen.f_frsize
    # Some file systems of the kernel have no size.
    if seen.f_blocks and free < least:
        raise StackctlError(
            f"{folder} has {format_bytes(free)} left, {format_bytes(least)} are needed",
            hint=f"make room (df -h {folder}), then again",
            exit_code=ExitCode.HOST,
        )


def apply_plans(
    target: TargetRoot,
    store: UndoStore,
    plans: Sequence[ItemPlan],
    user: str,
    progress: StepProgress,
) -> None:
    """Make the changes of all items, in order, and record them as made by ``user``.

    Raises:
        StackctlError: a change failed. Earlier changes stay and are recorded, later ones are not
            made.
    """
    if any(isinstance(one.change, PackagesChange) for one in store.read().changes):
        # An earlier run may have crashed during an installation.
        apt.finish_interrupted()
    for plan in plans:
        if plan.status != "change":
            continue
        progress.progress(plan.item, plan.why)
        try:
            for change in plan.changes:
                if not isinstance(change, ReloadChange | RestartChange):
                    old = changes.previous_state(target, change)
                    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                    new = RecordedChange(
                        item=plan.item, change=change, before=old, when=when, user=user
                    )
                    store.add(new)
                    if old.names:
                        progress.step(plan.item, f"installing {len(old.names)} packages")
                with defer_signals():
                    changes.perform(target, change)
        except StackctlError as error:
            raise _at(plan.item, error) from None
        progress.step(plan.item, "done" if plan.effect is None else "done, from the next login on")


def undo_changes(
    target: TargetRoot, store: UndoStore, items: Callable[[str], bool], progress: StepProgress
) -> tuple[tuple[str, str], ...]:
    """Revert the recorded changes of some items, the newest first.

    Return (item, reason) for each change that has to stay.

    Raises:
        StackctlError: a change cannot be reverted; it and those still to come stay on record.
    """
    stay: list[tuple[str, str]] = []
    done = undo_order(store, items)
    for number, one in enumerate(done):
        if isinstance(one.change, ProgramChange) and stay:
            stay.append((one.item, _STAYS))
            continue
        progress.progress(one.item, "goes back to its previous state")
        try:
            with defer_signals():
                kept = changes.revert(target, one.change, one.before)
                if kept is None:
                    store.drop(one)
        except StackctlError as error:
            raise _at(one.item, error) from None
        if kept is not None:
            stay.append((one.item, kept))
        elif all(later.item != one.item for later in done[number + 1 :]):
            progress.step(one.item, "as it was")
    if any(isinstance(o.change, FileChange) and "/systemd/" in o.change.path for o in done):
        runner.run(("systemctl", "daemon-reload"), timeout_s=120)
    return tuple(stay)


def undo_order(store: UndoStore, items: Callable[[str], bool]) -> tuple[RecordedChange, ...]:
    """Return the changes that an undo reverts: the newest first, stackctl itself at the end."""
    chosen = [one for one in reversed(store.read().changes) if items(one.item)]
    return tuple(sorted(chosen, key=lambda one: isinstance(one.change, ProgramChange)))


def require_no_stacks(target: TargetRoot, done: Sequence[RecordedChange]) -> None:
    """Raise StackctlError (exit 5) if a stack is up that needs one of these changes."""
    if not any(one.item in _CARRYING for one in done):
        return
    homes = ["/etc"]
    for one in done:
        if isinstance(one.change, LingerChange):
            found = account(one.change.user)
            homes += [f"{found.pw_dir}/.config"] if found is not None else []
    for home in homes:
        for path in target.machine.glob(f"{home}/containers/systemd/stackctl/*/*"):
            stack = path.split("/")[-2]
            raise StackctlError(
                f"{stack} is up ({path})",
                hint=f"stackctl down {stack}, as its user; then again",
                exit_code=ExitCode.REFUSED,
            )


def _at(item: str, error: StackctlError) -> StackctlError:
    hint = "\n".join(filter(None, (error.hint, _AGAIN)))
    return StackctlError(
        f"{item}: {error.message}", hint=hint, details=error.details, exit_code=error.exit_code
    )
