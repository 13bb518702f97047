"""Checks before provisioning, for faults that would interrupt it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.lock import record_lock_holder
from stackctl.provision.target_root import TargetRoot
from stackctl.provision.undo_record import PATH
from stackctl.quantity import format_bytes
from stackctl.values.provision import HoldChange, ItemPlan, PackagesChange, ProgramChange

_MIB = 2**20
#: apt and dpkg hold this lock while they change packages.
_DPKG_LOCK = "/var/lib/dpkg/lock-frontend"
#: Podman with its dependencies takes about 130 MiB on Debian 13, and its archives come on top.
_PACKAGES, _PROGRAM, _FILES = 500 * _MIB, 64 * _MIB, _MIB


def require_ready(target: TargetRoot, plans: Sequence[ItemPlan]) -> None:
    """Check free space, read-only file systems and the package manager's lock.

    Raises:
        StackctlError: exit 6, with the remedy, if a change could not be made.
    """
    changes = [change for plan in plans for change in plan.changes]
    wanted = {"/etc": _FILES, PATH.rpartition("/")[0]: _FILES}
    if any(isinstance(change, PackagesChange) for change in changes):
        wanted |= {"/usr": _PACKAGES, "/var": _PACKAGES}
    if any(isinstance(change, ProgramChange) for change in changes):
        wanted["/usr/local"] = _PROGRAM
    for folder, least in wanted.items():
        _require_room(target, folder, least)
    if any(isinstance(change, PackagesChange | HoldChange) for change in changes):
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
