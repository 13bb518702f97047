"""Resource limits that a service of one scope can reach."""

from __future__ import annotations

import re

from stackctl.probe.fact_reader import FactReader
from stackctl.probe.tools import manager_socket, user_service
from stackctl.requirements.facts import ProbeUser, Scope
from stackctl.values.host import UNLIMITED, Limits

_CAP_SYS_RESOURCE = 24


def probe_limits(reader: FactReader, scope: Scope, user: ProbeUser) -> Limits:
    """Read the hard limits of the manager that starts the services."""
    if scope == "system":
        memlock, nofile = _hard_limits(reader, 1)
        if can_raise_limits(reader):
            # Whatever the limit, the kernel lets no process open more files than nr_open.
            return Limits(memlock_bytes=UNLIMITED, nofile=reader.number("/proc/sys/fs/nr_open"))
        return Limits(memlock_bytes=memlock, nofile=nofile)
    manager = None if user.uid is None else _user_manager(reader, user.uid)
    if manager is None:
        return Limits()
    memlock, nofile = _hard_limits(reader, manager)
    return Limits(memlock_bytes=memlock, nofile=nofile)


def can_raise_limits(reader: FactReader) -> bool | None:
    """Return True if the system manager can give any limit to its services; None if unknown."""
    status = reader.text("/proc/1/status") or ""
    line = re.search(r"^CapBnd:\s+([0-9a-f]{1,16})\s*$", status, re.MULTILINE)
    if line is None:
        return None
    mapped = (reader.text("/proc/1/uid_map") or "").split()
    if mapped and mapped != ["0", "0", "4294967295"]:
        # In a user namespace the capability does not reach limits of the machine.
        return False
    return bool(int(line[1], 16) >> _CAP_SYS_RESOURCE & 1)


def _hard_limits(reader: FactReader, pid: int) -> tuple[int | None, int | None]:
    text = reader.text(f"/proc/{pid}/limits") or ""
    return _hard(text, "Max locked memory"), _hard(text, "Max open files")


def _hard(text: str, name: str) -> int | None:
    line = re.search(rf"^{name}\s+\S+\s+([0-9]{{1,19}}|unlimited)\s", text, re.MULTILINE)
    if line is None:
        return None
    return UNLIMITED if line[1] == "unlimited" else int(line[1])


def _user_manager(reader: FactReader, uid: int) -> int | None:
    """Return the PID of a user's service manager; None if it is not found."""
    if reader.machine.live and not reader.exists(manager_socket(uid)):
        return None
    # Its cgroup lists its PID. With cgroup version 1, all processes are searched.
    listed = (reader.text(f"{user_service(uid)}/init.scope/cgroup.procs") or "").split()[:64]
    for pid in listed:
        if _is_manager(reader, pid, uid):
            return int(pid)
    for path in reader.machine.glob("/proc/[0-9]*/comm"):
        pid = path.split("/")[2]
        if reader.line(path) == "systemd" and _is_manager(reader, pid, uid):
            return int(pid)
    return None


def _is_manager(reader: FactReader, pid: str, uid: int) -> bool:
    if not re.fullmatch("[0-9]{1,10}", pid):
        return False
    argv = (reader.text(f"/proc/{pid}/cmdline") or "").split("\0")
    if not argv[0].endswith("systemd") or "--user" not in argv[1:]:
        return False
    status = reader.text(f"/proc/{pid}/status") or ""
    return bool(re.search(rf"^Uid:\s+{uid}\s", status, re.MULTILINE))
