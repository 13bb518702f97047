"""Descriptions of changes and of their undo, and the commands that make them by hand."""

from __future__ import annotations

import shlex

from stackctl.requirements.facts import MachineFacts
from stackctl.requirements.requirement import diff
from stackctl.values.provision import (
    AccountChange,
    Change,
    CommandChange,
    EnableChange,
    FileChange,
    FolderChange,
    GuardChange,
    HoldChange,
    LingerChange,
    PackagesChange,
    PreviousState,
    ProgramChange,
    ReloadChange,
    RestartChange,
    SettingChange,
    ShownChange,
    SubidsChange,
)


def describe(change: Change, facts: MachineFacts) -> ShownChange:
    """Describe a change on the machine of these facts."""
    match change:
        case FileChange():
            before = facts.files.get(change.path)
            verb = "create" if before is None else "update"
            return ShownChange(
                what=f"{verb} {change.path} ({change.mode:04o})",
                diff=diff(before or "", change.text),
            )
        case SettingChange():
            values = {facts.settings[p].value for p in change.paths if p in facts.settings}
            alone = len(change.paths) == 1
            return ShownChange(
                what=f"set {_files(change)}: {', '.join(sorted(values))} -> {change.value}",
                command=f"echo {change.value} | sudo tee {change.paths[0]}" if alone else None,
            )
        case ProgramChange():
            return ShownChange(what=f"copy this stackctl to {change.folder}, link {change.link}")
        case _:
            words, command = made_by_command(change)
            return ShownChange(what=words, command=shlex.join(command))


def describe_revert(change: Change, old: PreviousState) -> ShownChange:
    """Describe the effect of a revert."""
    command = None
    match change:
        case FileChange():
            verb = "remove" if old.data is None else "put back the earlier"
            words = f"{verb} {change.path}"
        case FolderChange():
            words = f"remove the folder {change.path}, if it is empty"
        case SettingChange():
            values = ", ".join(sorted(set(old.values)))
            words = f"set {_files(change)}: {change.value} -> {values}"
        case PackagesChange():
            words = f"remove the packages {' '.join(old.names)}"
        case HoldChange():
            words, command = "release", f"apt-mark unhold {' '.join(change.names)}"
        case AccountChange():
            words = f"remove the account {change.user}, and {change.home} if it is empty"
        case SubidsChange():
            words = f"take {change.count} ids from {change.user}"
        case LingerChange():
            words = f"services of {change.user} end with the last logout"
        case ReloadChange() | RestartChange():
            words, _ = made_by_command(change)
        case EnableChange():
            words, command = f"stop {change.unit}", f"systemctl disable --now {change.unit}"
        case GuardChange():
            words = f"stop the guard of {change.user or 'the system'}"
        case ProgramChange():
            words = f"remove {change.folder} and {change.link}"
    return ShownChange(what=words, command=command)


def made_by_command(change: CommandChange) -> tuple[str, tuple[str, ...]]:
    """Return a description of a change, and the command that makes it, also by hand."""
    match change:
        case FolderChange(path=path, owner=owner):
            whose = ("--owner", owner, "--group", owner) if owner else ()
            return (
                f"create the folder {path} (0755, {owner or 'root'}'s)",
                ("install", "--directory", "--mode=0755", *whose, path),
            )
        case PackagesChange(names=names, all_names=brought):
            more = f", {len(brought)} packages in all: {' '.join(brought)}" if brought else ""
            return (
                f"install {' '.join(names)}{more}",
                ("apt-get", "install", "--no-install-recommends", *names),
            )
        case HoldChange(names=names):
            return "hold", ("apt-mark", "hold", *names)
        case AccountChange(user=user, home=home):
            # Not --system: journald keeps a separate log for ordinary users only, and without
            # access to the log of a stack its user cannot see the cause of a failure. The item
            # ``subids`` adds the subordinate ids.
            return f"create the account {user}, home {home}, no login", (
                "useradd", "--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0",
                "--user-group", "--create-home", "--home-dir", home, "--skel", "/nonexistent",
                "--shell", "/usr/sbin/nologin", "--comment", "stacks of stackctl", user,
            )  # fmt: skip
        case SubidsChange(user=user, uid=uid, gid=gid, count=count):
            options = (("--add-subuids", uid), ("--add-subgids", gid))
            given = [(name, first) for name, first in options if first is not None]
            words = [word for name, n in given for word in (name, f"{n}-{n + count - 1}")]
            return f"give {user} {count} ids from {given[0][1]}", ("usermod", *words, user)
        case LingerChange(user=user):
            return f"start the services of {user} at boot", ("loginctl", "enable-linger", user)
        case ReloadChange():
            return "have systemd read its files again", ("systemctl", "daemon-reload")
        case RestartChange(unit=unit):
            return f"start {unit} again", ("systemctl", "restart", unit)
        case EnableChange(unit=unit):
            return f"start {unit}, now and at boot", ("systemctl", "enable", "--now", unit)
        case GuardChange(user=user, program=program):
            command = (program, "--user" if user else "--system", "guard", "--install")
            whose = ("runuser", "-u", user, "--") if user else ()
            return f"start the guard of {user or 'the system'}", (*whose, *command)


def _files(change: SettingChange) -> str:
    first, *more = change.paths
    return f"{first} and {len(more)} more" if more else first
