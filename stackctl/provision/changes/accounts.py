"""Accounts, their subordinate ids and their linger."""

from __future__ import annotations

import contextlib
import pwd
from collections.abc import Iterator
from pathlib import Path

from stackctl.machine import runner, subids
from stackctl.provision.changes.kind import CommandKind
from stackctl.provision.target_root import TargetRoot
from stackctl.values.provision import (
    AccountChange,
    LingerChange,
    PreviousState,
    ShownChange,
    SubidsChange,
)


class AccountKind(CommandKind[AccountChange]):
    """An account for stacks, without a password and a login."""

    def revert(self, target: TargetRoot, change: AccountChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        user, home = change.user, change.home
        found = account(user)
        if found is not None:
            # Running processes would keep the account busy, and could make new folders in its home.
            runner.run(("loginctl", "disable-linger", user), check=False)
            runner.run(("loginctl", "terminate-user", user), check=False)
            runner.run(("systemctl", "stop", f"user@{found.pw_uid}.service"), check=False)
        _remove_empty(target.path_of(home))
        if target.exists(home):
            # Files of a removed account would belong to the next account with its number.
            return (
                f"{user} stays, as {home} is not empty; once nothing in it is wanted: "
                f"sudo userdel --remove {user}"
            )
        if found is not None:
            runner.run(("userdel", user))
        return None

    def command(self, change: AccountChange) -> tuple[str, ...]:
        """See CommandKind."""
        # Not --system: journald keeps a separate log for ordinary users only, and without access to
        # the log of a stack its user cannot see the cause of a failure. The item ``subids`` adds
        # the subordinate ids.
        return (
            "useradd", "--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0",
            "--user-group", "--create-home", "--home-dir", change.home, "--skel", "/nonexistent",
            "--shell", "/usr/sbin/nologin", "--comment", "stacks of stackctl", change.user,
        )  # fmt: skip

    def words(self, change: AccountChange) -> str:
        """See CommandKind."""
        return f"create the account {change.user}, home {change.home}, no login"

    def describe_revert(self, change: AccountChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(
            what=f"remove the account {change.user}, and {change.home} if it is empty"
        )


class SubidsKind(CommandKind[SubidsChange]):
    """Subordinate user and group ids of an account."""

    def perform(self, target: TargetRoot, change: SubidsChange) -> None:
        """See ChangeKind."""
        for path, line in _lines(change):
            subids.add_line(target.path_of(path), line)

    def revert(self, target: TargetRoot, change: SubidsChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        for path, line in _lines(change):
            subids.remove_line(target.path_of(path), line)
        return None

    def command(self, change: SubidsChange) -> tuple[str, ...]:
        """See CommandKind."""
        words: list[str] = []
        for option, first in (("--add-subuids", change.uid), ("--add-subgids", change.gid)):
            if first is not None:
                words += [option, f"{first}-{first + change.count - 1}"]
        return ("usermod", *words, change.user)

    def words(self, change: SubidsChange) -> str:
        """See CommandKind."""
        first = change.uid if change.uid is not None else change.gid
        return f"give {change.user} {change.count} ids from {first}"

    def describe_revert(self, change: SubidsChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"take {change.count} ids from {change.user}")


class LingerKind(CommandKind[LingerChange]):
    """Linger: the services of a user start at boot and outlive logins."""

    def revert(self, target: TargetRoot, change: LingerChange, old: PreviousState) -> str | None:  # noqa: ARG002
        """See ChangeKind."""
        if account(change.user) is not None:
            runner.run(("loginctl", "disable-linger", change.user))
        return None

    def command(self, change: LingerChange) -> tuple[str, ...]:
        """See CommandKind."""
        return ("loginctl", "enable-linger", change.user)

    def words(self, change: LingerChange) -> str:
        """See CommandKind."""
        return f"start the services of {change.user} at boot"

    def describe_revert(self, change: LingerChange, old: PreviousState) -> ShownChange:  # noqa: ARG002
        """See ChangeKind."""
        return ShownChange(what=f"services of {change.user} end with the last logout")


def account(user: str) -> pwd.struct_passwd | None:
    """Return an account by its name; None if there is none."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those in it, as far as they hold no file."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                _remove_empty(path)
        folder.rmdir()


def _lines(change: SubidsChange) -> Iterator[tuple[str, str]]:
    """Yield the files that grant ids, each with its line."""
    for path, first in (("/etc/subuid", change.uid), ("/etc/subgid", change.gid)):
        if first is not None:
            yield path, f"{change.user}:{first}:{change.count}"
