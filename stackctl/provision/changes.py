"""Makes the changes of a machine, and reverts them to the state before."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import runner, subids
from stackctl.machine.files import remove_file, write_atomically
from stackctl.probe.tools import manager_socket
from stackctl.provision import apt, self_install
from stackctl.provision.change_text import made_by_command
from stackctl.provision.target_root import TargetRoot
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
    PreviousState,
    ProgramChange,
    ReloadChange,
    RestartChange,
    SettingChange,
    SubidsChange,
)

#: Folders that stay when Podman's package is removed: its tmpfiles.d makes those in /var at each
#: boot, podman 4 that of its networks when root runs it, and units were in systemd's.
_OF_PODMAN = (
    "/var/lib/cni/networks", "/var/lib/cni",
    "/etc/containers/networks", "/etc/containers/systemd", "/etc/containers",
)  # fmt: skip
#: Seconds that a user's service manager may take to start.
_MANAGER_S = 30.0


def previous_state(target: TargetRoot, change: Change) -> PreviousState:
    """Return the state that a change replaces, complete enough to restore it.

    Raises:
        StackctlError: the state cannot be read, or packages cannot be found.
    """
    match change:
        case FileChange():
            return _file_state(target, change.path)
        case FolderChange():
            return PreviousState(folders=_missing_folders(target, target.path_of(change.path)))
        case SettingChange():
            return PreviousState(values=tuple(_kernel_value(target, path) for path in change.paths))
        case PackagesChange():
            absent = tuple(path for path in _OF_PODMAN if not target.exists(path))
            return PreviousState(names=apt.packages_to_install(change.names), folders=absent)
        case _:
            return PreviousState()


def perform(target: TargetRoot, change: Change) -> None:
    """Make a change. Raises StackctlError if it fails; part of it may be made then."""
    match change:
        case FileChange():
            place = target.path_of(change.path)
            write_atomically(place, change.text, mode=change.mode, keep_folder=True)
        case SettingChange():
            for path in change.paths:
                _write_kernel_value(target, path, change.value)
        case PackagesChange():
            apt.install_packages(change.names)
        case SubidsChange():
            for path, line in _subid_lines(change):
                subids.add_line(target.path_of(path), line)
        case GuardChange():
            _run_guard(target, change.user, (change.program,), "--install")
        case ProgramChange():
            self_install.install_program(target.path_of(change.folder))
            _link(target.path_of(change.link), f"{change.folder}/bin/stackctl")
        case _:
            _, command = made_by_command(change)
            runner.run(command, timeout_s=120)


def revert(target: TargetRoot, change: Change, old: PreviousState) -> str | None:
    """Restore ``old``. Return the reason if the change has to stay, None if it is reverted.

    A change stays, for example, if somebody has edited its file since.

    Raises:
        StackctlError: it could not be restored.
    """
    match change:
        case FileChange():
            return _revert_file(target, change, old)
        case FolderChange():
            return _remove_folders(target, old.folders, wanted=change.path)
        case SettingChange():
            return _revert_setting(target, change, old)
        case PackagesChange():
            return _revert_packages(target, old)
        case HoldChange():
            runner.run(("apt-mark", "unhold", *change.names))
        case AccountChange():
            return _remove_account(target, change)
        case SubidsChange():
            for path, line in _subid_lines(change):
                subids.remove_line(target.path_of(path), line)
        case LingerChange():
            if account(change.user) is not None:
                runner.run(("loginctl", "disable-linger", change.user))
        case EnableChange():
            runner.run(("systemctl", "disable", "--now", "--quiet", change.unit), check=False)
        case GuardChange():
            if change.user is None or account(change.user) is not None:
                # stackctl itself may have been removed first.
                there = target.exists(change.program)
                words = (change.program,) if there else runner.own_command()
                _run_guard(target, change.user, words, "--remove")
        case ProgramChange():
            link = target.path_of(change.link)
            if link.is_symlink() and os.readlink(link).startswith(change.folder):  # noqa: PTH115
                remove_file(link)
            # This works even while this program runs from the folder.
            shutil.rmtree(target.path_of(change.folder), ignore_errors=True)
        case ReloadChange() | RestartChange():
            pass
    return None


def account(user: str) -> pwd.struct_passwd | None:
    """Return an account by its name; None if there is none."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def restart_manager(uid: int) -> None:
    """Restart a user's service manager. That ends all sessions and services of the user."""
    runner.run(("systemctl", "restart", f"user@{uid}.service"), timeout_s=180)


def _file_state(target: TargetRoot, path: str) -> PreviousState:
    """Return a file's bytes, mode and owner, and the missing folders of its path."""
    folders = _missing_folders(target, target.path_of(path).parent)
    found = target.stat(path)
    if found is None:
        return PreviousState(folders=folders)
    if not stat.S_ISREG(found.st_mode):
        raise StackctlError(f"{path} is not a file", hint=f"look at it: ls -l {path}")
    try:
        data = target.path_of(path).read_bytes()
    except OSError as error:
        raise StackctlError(f"cannot read {path}: {error.strerror}") from None
    return PreviousState(
        data=base64.b64encode(data).decode(),
        mode=found.st_mode & 0o7777,
        uid=found.st_uid,
        gid=found.st_gid,
        folders=folders,
    )


def _revert_file(target: TargetRoot, change: FileChange, old: PreviousState) -> str | None:
    path = change.path
    there = target.read(path)
    original = None if old.data is None else base64.b64decode(old.data)
    if there is not None and there != change.text and there.encode() != original:
        return f"{path} was changed since: it stays"
    if original is None:
        if there is not None:
            remove_file(target.path_of(path))
        return _remove_folders(target, old.folders)
    # The original is a text of stackctl: a plan refuses to replace a foreign file.
    was = original.decode("utf-8", "surrogateescape")
    write_atomically(target.path_of(path), was, mode=old.mode or 0, keep_folder=True)
    os.chown(target.path_of(path), old.uid or 0, old.gid or 0)
    return None


def _missing_folders(target: TargetRoot, folder: Path) -> tuple[str, ...]:
    """Return the folder and its parents that do not exist, the innermost first."""
    found = []
    while not folder.exists():
        found.append("/" + str(folder.relative_to(target.root)))
        folder = folder.parent
    return tuple(found)


def _remove_folders(
    target: TargetRoot, folders: Iterable[str], *, wanted: str | None = None
) -> str | None:
    """Remove the empty ones of some folders, in order. Return a reason if ``wanted`` stays."""
    for folder in folders:
        try:
            target.path_of(folder).rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            if folder == wanted:
                return f"{folder} is not empty: it stays"
    return None


def _revert_setting(target: TargetRoot, change: SettingChange, old: PreviousState) -> str | None:
    kept = []
    for path, was in zip(change.paths, old.values, strict=True):
        now = target.kernel_value(path)
        if now == change.value:
            _write_kernel_value(target, path, was)
        elif now not in (None, was):
            kept.append(path)
    return f"{' '.join(kept)}: changed since, it stays" if kept else None


def _kernel_value(target: TargetRoot, path: str) -> str:
    value = target.kernel_value(path)
    if value is None:
        raise _gone(path)
    return value


def _write_kernel_value(target: TargetRoot, path: str, value: str) -> None:
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


def _revert_packages(target: TargetRoot, old: PreviousState) -> str | None:
    text = target.read("/var/lib/dpkg/status") or ""
    here = {line.removeprefix("Package: ") for line in text.splitlines() if "Package: " in line}
    left = [name for name in old.names if name in here]
    if left:
        others = apt.reverse_dependencies(left)
        if others:
            return f"{' '.join(others)}, installed since, need them: they stay"
        apt.remove_packages(left)
    return _remove_folders(target, old.folders)


def _remove_account(target: TargetRoot, change: AccountChange) -> str | None:
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


def _remove_empty(home: Path) -> None:
    """Remove a folder and those in it, as far as they hold no file."""
    for folder, _, _ in os.walk(home, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _subid_lines(change: SubidsChange) -> Iterator[tuple[str, str]]:
    """Yield the files that grant ids, each with its line."""
    for path, first in (("/etc/subuid", change.uid), ("/etc/subgid", change.gid)):
        if first is not None:
            yield path, f"{change.user}:{first}:{change.count}"


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
