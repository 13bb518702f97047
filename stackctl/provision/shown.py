"""Changes as people read them: words, a diff, and the command that does the same by hand."""

from __future__ import annotations

import shlex

from stackctl.provision import ours
from stackctl.provision.facts import Facts
from stackctl.values.provision import (
    AccountChange,
    Change,
    EnableChange,
    FileChange,
    FolderChange,
    GuardChange,
    HoldChange,
    LingerChange,
    PackagesChange,
    ProgramChange,
    Recorded,
    ReloadChange,
    SettingChange,
    ShownChange,
    SubidsChange,
)


def show(change: Change, facts: Facts) -> ShownChange:
    """A change, as it would be on this machine."""
    match change:
        case FileChange(path=path, text=text, mode=mode):
            before = facts.files.get(path)
            verb = "create" if before is None else "update"
            return ShownChange(
                what=f"{verb} {path} ({mode:04o})", diff=ours.diff(before or "", text)
            )
        case SettingChange(paths=paths, value=value):
            now = sorted({facts.settings[path].value for path in paths if path in facts.settings})
            where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            return ShownChange(
                what=f"set {where}: {', '.join(now)} -> {value}",
                command=f"echo {value} | sudo tee {' '.join(paths[:1])}"
                if len(paths) == 1
                else None,
            )
        case PackagesChange(names=names, all_names=brought):
            more = f", {len(brought)} packages in all: {' '.join(brought)}" if brought else ""
            return ShownChange(
                what=f"install {' '.join(names)}{more}",
                command=f"apt-get install --no-install-recommends {' '.join(names)}",
            )
        case HoldChange(names=names):
            return ShownChange(what="hold", command=f"apt-mark hold {' '.join(names)}")
        case ProgramChange(folder=folder, link=link):
            return ShownChange(what=f"copy this stackctl to {folder}, link {link}")
        case _:
            return ShownChange(what=_words(change), command=shlex.join(command(change)))


def undone(one: Recorded) -> ShownChange:
    """What taking a change back does."""
    old = one.before
    match one.change:
        case FileChange(path=path):
            back = "remove" if old.data is None else "put back the earlier"
            return ShownChange(what=f"{back} {path}")
        case SettingChange(paths=paths, value=value):
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            was = ", ".join(sorted(set(old.values)))
            return ShownChange(what=f"set {paths[0]}{more}: {value} -> {was}")
        case FolderChange(path=path):
            return ShownChange(what=f"remove the folder {path}, if it is empty")
        case PackagesChange():
            return ShownChange(what=f"remove the packages {' '.join(old.names)}")
        case HoldChange(names=names):
            return ShownChange(what="release", command=f"apt-mark unhold {' '.join(names)}")
        case AccountChange(user=user, home=home):
            return ShownChange(what=f"remove the account {user}, and {home} if it is empty")
        case SubidsChange(user=user, count=count):
            return ShownChange(what=f"take {count} ids from {user}")
        case LingerChange(user=user):
            return ShownChange(what=f"services of {user} end with the last logout")
        case EnableChange(unit=unit):
            return ShownChange(what=f"stop {unit}", command=f"systemctl disable --now {unit}")
        case ProgramChange(folder=folder, link=link):
            return ShownChange(what=f"remove {folder} and {link}")
        case GuardChange(user=user):
            return ShownChange(what=f"stop the guard of {user or 'the system'}")
        case ReloadChange():
            return ShownChange(what="have systemd read its files again")


def command(change: Change) -> tuple[str, ...]:
    """The command that makes a change, where one does."""
    match change:
        case FolderChange(path=path, owner=owner):
            whose = ("--owner", owner, "--group", owner) if owner else ()
            return ("install", "--directory", "--mode=0755", *whose, path)
        case AccountChange(user=user, home=home):
            # Not --system: journald keeps a log apart for ordinary users only, and who may not read
            # what its stacks say is told no cause of anything. Its ids are an item of their own.
            return (
                "useradd", "--key", "SUB_UID_COUNT=0", "--key", "SUB_GID_COUNT=0",
                "--user-group", "--create-home", "--home-dir", home, "--skel", "/nonexistent",
                "--shell", "/usr/sbin/nologin", "--comment", "stacks of stackctl", user,
            )  # fmt: skip
        case SubidsChange(user=user, uid=uid, gid=gid, count=count):
            words: list[str] = []
            for option, first in (("--add-subuids", uid), ("--add-subgids", gid)):
                if first is not None:
                    words += [option, f"{first}-{first + count - 1}"]
            return ("usermod", *words, user)
        case LingerChange(user=user):
            return ("loginctl", "enable-linger", user)
        case ReloadChange():
            return ("systemctl", "daemon-reload")
        case EnableChange(unit=unit):
            return ("systemctl", "enable", "--now", unit)
        case GuardChange(user=None, program=program):
            return (program, "--system", "guard", "--install")
        case GuardChange(user=user, program=program):
            assert user is not None
            return ("runuser", "-u", user, "--", program, "--user", "guard", "--install")
        case _:
            raise AssertionError(change)


def _words(change: Change) -> str:
    match change:
        case FolderChange(path=path, owner=owner):
            return f"create the folder {path} (0755, {owner or 'root'}'s)"
        case AccountChange(user=user, home=home):
            return f"create the account {user}, home {home}, no login"
        case SubidsChange(user=user, uid=uid, gid=gid, count=count):
            first = uid if uid is not None else gid
            return f"give {user} {count} ids from {first}"
        case LingerChange(user=user):
            return f"start the services of {user} at boot"
        case ReloadChange():
            return "have systemd read its files again"
        case EnableChange(unit=unit):
            return f"start {unit}, now and at boot"
        case GuardChange(user=user):
            return f"start the guard of {user or 'the system'}"
        case _:
            raise AssertionError(change)
