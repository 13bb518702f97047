"""Who listens on a TCP port of this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from stackctl.errors import StackctlError
from stackctl.machine.files import Machine
from stackctl.values.cpulist import parse_cpulist

_LISTEN = "0A"
_SETTINGS = "/proc/sys/net/ipv4"


@dataclass(frozen=True)
class Listener:
    """The process behind a port; None where another user's process hides it."""

    pid: int | None
    command: str | None

    def __str__(self) -> str:
        if self.pid is None:
            return "a process of another user"
        return f"{self.command or 'process'} (process {self.pid})"


def reserved(machine: Machine) -> frozenset[int]:
    """Ports that the administrator keeps from being given away (ip_local_reserved_ports)."""
    # The same form as a list of CPUs.
    return frozenset(parse_cpulist(machine.read(f"{_SETTINGS}/ip_local_reserved_ports") or ""))


def outgoing(machine: Machine) -> range:
    """Ports that Linux gives to outgoing connections (ip_local_port_range); empty where unknown."""
    words = (machine.read(f"{_SETTINGS}/ip_local_port_range") or "").split()
    return range(int(words[0]), int(words[1]) + 1) if len(words) == 2 else range(0)


def listener(machine: Machine, port: int) -> Listener | None:
    """The process that keeps 127.0.0.1:port from being bound; None when it is free.

    Raises StackctlError for a port that only root may bind.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise StackctlError(
                f"port {port} is not for ordinary users",
                hint="one from 1024 on: --set port=8080",
            ) from None
        except OSError:
            pass
        else:
            return None
    inodes = {
        fields[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in (line.split() for line in (machine.read(table) or "").splitlines()[1:])
        if len(fields) > 9
        and fields[3] == _LISTEN
        and int(fields[1].rpartition(":")[2], 16) == port
    }
    for path in machine.glob("/proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(path)  # noqa: PTH115 - thousands of them
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            pid = int(path.split("/")[2])
            return Listener(pid, (machine.read(f"/proc/{pid}/comm") or "").strip() or None)
    return Listener(None, None)
