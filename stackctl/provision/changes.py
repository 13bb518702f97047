"""Single changes of the machine: what is there before one, making it, taking it back."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stackctl.deploy import guardtimer
from stackctl.errors import StackctlError
from stackctl.machine import runner, subids
from stackctl.machine.files import remove_file, write_atomically
from stackctl.probe.tools import manager_socket
from stackctl.provision import apt, program
from stackctl.provision.box import Box
from stackctl.provision.shown import command
from stackctl.values.provision import (
    AccountChange,
    Before,
    Change,
    EnableChange,
    FileChange,
    FolderChange,
    GuardChange,
    HoldChange,
    LingerChange,
    PackagesChange,
    ProgramChange,
    ReloadChange,
    SettingChange,
    SubidsChange,
)

#: What Podman's package has made at each boot (its tmpfiles.d), and leaves when it is removed.
_AT_BOOT = ("/var/lib/cni/networks", "/var/lib/cni")
#: How long a user's service manager may take to start.
_MANAGER_S = 30.0


def before(box: Box, change: Change) -> Before:
    """What a change would replace, complete enough to put it back.

    Raises:
        StackctlError: it cannot be read, or packages cannot be found.
    """
    match change:
        case FileChange(path=path):
            return _file_before(box, path)
        case SettingChange(paths=found):
            return Before(values=tuple(_value(box, path) for path in found))
        case FolderChange(path=path):
            return Before(folders=_missing_folders(box, box.at(path)))
        case PackagesChange(names=names):
            absent = tuple(path for path in _AT_BOOT if not box.there(path))
            return Before(names=apt.would_come(names), folders=absent)
        case _:
            return Before()


def perform(box: Box, change: Change) -> None:
    """Make a change. Raises StackctlError, and then nothing or all of it is done."""
    match change:
        case FileChange(path=path, text=text, mode=mode):
            write_atomically(box.at(path), text, mode=mode, keep_folder=True)
        case SettingChange(paths=found, value=value):
            for path in found:
                _write_setting(box, path, value)
        case PackagesChange(names=names):
            apt.install(names)
        case HoldChange(names=names):
            apt.hold(names)
        case SubidsChange():
            for path, line in _subids(change):
                subids.add(box.at(path), line)
        case ProgramChange(folder=folder, link=link):
            program.install(box.at(folder))
            _link(box.at(link), f"{folder}/bin/stackctl")
        case GuardChange(user=user, program=path):
            _guard(box, user, (path,), "--install")
        case _:
            runner.run(command(change), timeout_s=120)


def revert(box: Box, change: Change, old: Before) -> str | None:
    """Put back what was there; why not, where somebody has changed it since.

    Raises:
        StackctlError: it is meant to be put back, and that fails.
    """
    match change:
        case FileChange(path=path, text=text):
            return _revert_file(box, path, text, old)
        case SettingChange(paths=found, value=value):
            return _revert_setting(box, found, value, old)
        case FolderChange(path=path):
            return _remove_folders(box, old.folders, path)
        case PackagesChange():
            kept = _remove_packages(box, old.names)
            return kept or _remove_folders(box, old.folders, None)
        case HoldChange(names=names):
            apt.release(names)
        case AccountChange(user=user, home=home):
            return _remove_account(box, user, home)
        case SubidsChange():
            for path, line in _subids(change):
                subids.remove(box.at(path), line)
        case LingerChange(user=user):
            if _account(user) is not None:
                runner.run(("loginctl", "disable-linger", user))
        case EnableChange(unit=unit):
            runner.run(("systemctl", "disable", "--now", "--quiet", unit), check=False)
        case ProgramChange(folder=folder, link=link):
            if box.at(link).is_symlink() and os.readlink(box.at(link)).startswith(folder):  # noqa: PTH115
                remove_file(box.at(link))
            program.remove(box.at(folder))
        case GuardChange(user=user, program=path):
            if user is None or _account(user) is not None:
                # stackctl itself may have been taken away first.
                words = (path,) if box.there(path) else guardtimer.running_program()
                _guard(box, user, words, "--remove")
        case ReloadChange():
            pass
    return None


# Files


def _file_before(box: Box, path: str) -> Before:
    folders = _missing_folders(box, box.at(path).parent)
    found = box.stat(path)
    if found is None:
        return Before(folders=folders)
    if not box.is_plain(path):
        raise StackctlError(f"{path} is not a file", hint=f"look at it: ls -l {path}")
    try:
        data = box.at(path).read_bytes()
    except OSError as error:
        raise StackctlError(f"cannot read {path}: {error.strerror}") from None
    return Before(
        data=base64.b64encode(data).decode(),
        mode=found.st_mode & 0o7777,
        uid=found.st_uid,
        gid=found.st_gid,
        folders=folders,
    )


def _revert_file(box: Box, path: str, text: str, old: Before) -> str | None:
    there = box.read(path)
    original = None if old.data is None else base64.b64decode(old.data)
    if there is not None and there != text and there.encode() != original:
        return f"{path} was changed since: it stays"
    if original is None:
        if there is not None:
            remove_file(box.at(path))
        return _remove_folders(box, old.folders, None)
    # What we replace is our own text, or an older one of it.
    was = original.decode("utf-8", "surrogateescape")
    write_atomically(box.at(path), was, mode=old.mode or 0, keep_folder=True)
    os.chown(box.at(path), old.uid or 0, old.gid or 0)
    return None


def _missing_folders(box: Box, folder: Path) -> tuple[str, ...]:
    """Folders that have to be made, the innermost first."""
    found = []
    while not folder.exists():
        found.append("/" + str(folder.relative_to(box.root)))
        folder = folder.parent
    return tuple(found)


def _remove_folders(box: Box, folders: Iterable[str], wanted: str | None) -> str | None:
    """Remove what we made, as far as nothing is in it."""
    for folder in folders:
        try:
            box.at(folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return f"{folder} is not empty: it stays" if folder == wanted else None
    return None


def _link(link: Path, target: str) -> None:
    """Have a link, in one step."""
    made = link.with_name(f".{link.name}.new")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        made.symlink_to(target)
        made.rename(link)
    except OSError as error:
        raise StackctlError(f"cannot make the link {link}: {error.strerror}") from None


# Settings of the kernel


def _value(box: Box, path: str) -> str:
    value = box.value(path)
    if value is None:
        raise _gone(path)
    return value


def _write_setting(box: Box, path: str, value: str) -> None:
    try:
        # Not atomically: it is no file, and there is no other that could take its place.
        descriptor = os.open(box.at(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
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


def _revert_setting(box: Box, found: tuple[str, ...], value: str, old: Before) -> str | None:
    kept = []
    for path, was in zip(found, old.values, strict=True):
        now = box.value(path)
        if now == value:
            _write_setting(box, path, was)
        elif now not in (None, was):
            kept.append(path)
    return f"{' '.join(kept)}: changed since, it stays" if kept else None


# Packages, accounts, services


def _remove_packages(box: Box, names: tuple[str, ...]) -> str | None:
    text = box.read("/var/lib/dpkg/status") or ""
    here = {line.removeprefix("Package: ") for line in text.splitlines() if "Package: " in line}
    left = [name for name in names if name in here]
    if not left:
        return None
    others = apt.removable(left)
    if others:
        return f"{' '.join(others)}, installed since, need them: they stay"
    apt.remove(left)
    return None


def home(user: str) -> str | None:
    """The home of an account, if there is one."""
    found = _account(user)
    return None if found is None else found.pw_dir


def _account(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def _remove_account(box: Box, user: str, home: str) -> str | None:
    found = _account(user)
    if found is not None:
        # What still runs would keep the account busy, and could put other folders in our way.
        runner.run(("loginctl", "disable-linger", user), check=False)
        runner.run(("loginctl", "terminate-user", user), check=False)
        runner.run(("systemctl", "stop", f"user@{found.pw_uid}.service"), check=False)
    _remove_empty(box.at(home))
    if box.there(home):
        # An account that went before its files would leave them to whoever gets its number.
        return (
            f"{user} stays, as {home} is not empty; once nothing in it is wanted: "
            f"sudo userdel --remove {user}"
        )
    if found is not None:
        runner.run(("userdel", user))
    return None


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those in it, as far as there is no file in them."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                _remove_empty(path)
        folder.rmdir()


def _subids(change: SubidsChange) -> Iterator[tuple[str, str]]:
    """The files that a user gets ids by, each with its line."""
    for path, first in (("/etc/subuid", change.uid), ("/etc/subgid", change.gid)):
        if first is not None:
            yield path, f"{change.user}:{first}:{change.count}"


def _guard(box: Box, user: str | None, words: tuple[str, ...], option: str) -> None:
    if user is None:
        runner.run((*words, "--system", "--quiet", "guard", option), timeout_s=120)
        return
    found = _account(user)
    if found is None:
        raise StackctlError(f"there is no account {user}", hint="stackctl provision makes it")
    deadline = time.monotonic() + _MANAGER_S
    while not box.there(manager_socket(found.pw_uid)) and time.monotonic() < deadline:
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
    """Start a user's service manager anew: it ends that user's sessions and services."""
    runner.run(("systemctl", "restart", f"user@{uid}.service"), timeout_s=180)
