"""Units of systemd, the guard's timer, and stackctl itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import runner
from stackctl.machine.atomic_files import remove_file
from stackctl.probe.tools import manager_socket
from stackctl.provision import self_install
from stackctl.provision.changes.accounts import account
from stackctl.provision.changes.kind import ChangeKind, CommandKind
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements.facts import MachineFacts
from stackctl.values.provision import (
    EnableChange,
    GuardChange,
    PreviousState,
    ProgramChange,
    ReloadChange,
    ShownChange,
)

#: Seconds that a user's service manager may take to start.
_MANAGER_S = 30.0


class ReloadKind(CommandKind[ReloadChange]):
    """A reload of systemd's files. It is not recorded, because it needs no undo."""

    def revert(self, target: TargetRoot, change: ReloadChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        return None

    def command(self, change: ReloadChange) -> tuple[str, ...]:  # noqa: ARG002
        """See CommandKind."""
        return ("systemctl", "daemon-reload")

    def words(self, change: ReloadChange) -> str:  # noqa: ARG002
        """See CommandKind."""
        return "have systemd read its files again"

    def describe_revert(self, change: ReloadChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=self.words(change))


class EnableKind(CommandKind[EnableChange]):
    """A system unit that is started now and at every boot."""

    def revert(self, target: TargetRoot, change: EnableChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        runner.run(("systemctl", "disable", "--now", "--quiet", change.unit), check=False)
        return None

    def command(self, change: EnableChange) -> tuple[str, ...]:
        """See CommandKind."""
        return ("systemctl", "enable", "--now", change.unit)

    def words(self, change: EnableChange) -> str:
        """See CommandKind."""
        return f"start {change.unit}, now and at boot"

    def describe_revert(self, change: EnableChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        unit = change.unit
        return ShownChange(what=f"stop {unit}", command=f"systemctl disable --now {unit}")


class GuardKind(CommandKind[GuardChange]):
    """The timer that runs ``stackctl guard`` for a user or for the system."""

    def perform(self, target: TargetRoot, change: GuardChange) -> None:
        """See ChangeKind."""
        _run_guard(target, change.user, (change.program,), "--install")

    def revert(self, target: TargetRoot, change: GuardChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        if change.user is None or account(change.user) is not None:
            # stackctl itself may have been removed first.
            there = target.exists(change.program)
            words = (change.program,) if there else runner.own_command()
            _run_guard(target, change.user, words, "--remove")
        return None

    def command(self, change: GuardChange) -> tuple[str, ...]:
        """See CommandKind."""
        if change.user is None:
            return (change.program, "--system", "guard", "--install")
        whose = ("runuser", "-u", change.user, "--")
        return (*whose, change.program, "--user", "guard", "--install")

    def words(self, change: GuardChange) -> str:
        """See CommandKind."""
        return f"start the guard of {change.user or 'the system'}"

    def describe_revert(self, change: GuardChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"stop the guard of {change.user or 'the system'}")


class ProgramKind(ChangeKind[ProgramChange]):
    """A copy of this stackctl in a folder of root, and a link to it in the search path."""

    def perform(self, target: TargetRoot, change: ProgramChange) -> None:
        """See ChangeKind."""
        self_install.install_program(target.path_of(change.folder))
        _link(target.path_of(change.link), f"{change.folder}/bin/stackctl")

    def revert(self, target: TargetRoot, change: ProgramChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        link = target.path_of(change.link)
        if link.is_symlink() and os.readlink(link).startswith(change.folder):  # noqa: PTH115
            remove_file(link)
        self_install.remove_program(target.path_of(change.folder))
        return None

    def describe(self, change: ProgramChange, facts: MachineFacts) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"copy this stackctl to {change.folder}, link {change.link}")

    def describe_revert(self, change: ProgramChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"remove {change.folder} and {change.link}")


def _link(link: Path, target: str) -> None:
    """Make or replace a link in one step."""
    made = link.with_name(f".{link.name}.new")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        made.symlink_to(target)
        made.rename(link)
    except OSError as error:
        raise StackctlError(f"cannot make the link {link}: {error.strerror}") from None


def _run_guard(target: TargetRoot, user: str | None, words: tuple[str, ...], option: str) -> None:
    if user is None:
        runner.run((*words, "--system", "--quiet", "guard", option), timeout_s=120)
        return
    found = account(user)
    if found is None:
        raise StackctlError(f"there is no account {user}", hint="stackctl provision makes it")
    deadline = time.monotonic() + _MANAGER_S
    while not target.exists(manager_socket(found.pw_uid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    runtime = f"/run/user/{found.pw_uid}"
    runner.run(
        (
            "runuser", "-u", user, "--", "env", "-i", "-C", "/",
            f"HOME={found.pw_dir}", f"USER={user}",
            "PATH=/usr/local/bin:/usr/bin:/bin", f"XDG_RUNTIME_DIR={runtime}",
            f"DBUS_SESSION_BUS_ADDRESS=unix:path={runtime}/bus",
            *words, "--user", "--quiet", "guard", option,
        ),
        timeout_s=120,
    )  # fmt: skip


def restart_manager(uid: int) -> None:
    """Restart a user's service manager. That ends all sessions and services of the user."""
    runner.run(("systemctl", "restart", f"user@{uid}.service"), timeout_s=180)
