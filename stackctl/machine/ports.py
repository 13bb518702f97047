"""Find the processes that listen on ports of this machine."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import sys
from dataclasses import dataclass
from typing import Literal

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.values.cpu_list import CpuList

#: States of include/net/tcp_states.h, in hexadecimal.
_LISTEN, _UNCONNECTED = "0A", "07"
_SETTINGS = "/proc/sys/net/ipv4"


@dataclass(frozen=True)
class Listener:
    """The process behind a port; None if it belongs to another user and so cannot be identified."""

    pid: int | None
    command: str | None

    def __str__(self) -> str:
        if self.pid is None:
            return "a process of another user"
        return f"{self.command or 'process'} (process {self.pid})"


def reserved_ports(machine: Machine) -> frozenset[int]:
    """Return the ports that the kernel does not assign by itself (ip_local_reserved_ports)."""
    # The kernel prints ports in the format of a CPU list.
    return frozenset(CpuList.parse(machine.read(f"{_SETTINGS}/ip_local_reserved_ports") or ""))


def ephemeral_ports(machine: Machine) -> range:
    """Return the ports for outgoing connections (ip_local_port_range); empty if unknown."""
    words = (machine.read(f"{_SETTINGS}/ip_local_port_range") or "").split()
    return range(int(words[0]), int(words[1]) + 1) if len(words) == 2 else range(0)


def listener(machine: Machine, port: int) -> Listener | None:
    """Return the process that listens on 127.0.0.1:port, or None if the port can be bound.

    Raises StackctlError for a port that only root may bind, or that cannot be bound for another
    reason than a listener.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EACCES:
                raise StackctlError(
                    f"port {port} needs root",
                    hint="use a port from 1024 on: --set port=8080",
                ) from None
            if error.errno != errno.EADDRINUSE:
                raise StackctlError(f"cannot bind port {port}: {error.strerror}") from None
        else:
            return None
    inodes = frozenset(
        fields[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in (line.split() for line in (machine.read(table) or "").splitlines()[1:])
        if len(fields) > 9
        and fields[3] == _LISTEN
        and int(fields[1].rpartition(":")[2], 16) == port
    )
    return socket_owner(machine, inodes)


def socket_owner(machine: Machine, inodes: frozenset[str]) -> Listener:
    """Return the first process that has one of these sockets open; unknown if none is visible."""
    for path in machine.glob("/proc/[0-9]*/fd/*"):
        target = machine.read_link(path) or ""
        if target.startswith("socket:[") and target[8:-1] in inodes:
            pid = int(path.split("/")[2])
            return Listener(pid, (machine.read(f"/proc/{pid}/comm") or "").strip() or None)
    return Listener(None, None)


@dataclass(frozen=True)
class Socket:
    """A TCP socket that listens, or a UDP socket: its address, port and inode."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    inode: str


def listening_sockets(machine: Machine, pid: int) -> tuple[Socket, ...] | None:
    """Return the sockets that accept requests in a process's network namespace.

    A connected UDP socket does not count, because only its peer can send to it. None if the
    process's /proc cannot be read.
    """
    tables: tuple[tuple[str, Literal["tcp", "udp"], str], ...] = (
        ("tcp", "tcp", _LISTEN), ("tcp6", "tcp", _LISTEN),
        ("udp", "udp", _UNCONNECTED), ("udp6", "udp", _UNCONNECTED),
    )  # fmt: skip
    found, seen = [], False
    for name, protocol, state in tables:
        text = machine.read(f"/proc/{pid}/net/{name}")
        seen = seen or text is not None
        for fields in (line.split() for line in (text or "").splitlines()[1:]):
            if len(fields) > 9 and fields[3] == state:
                with contextlib.suppress(ValueError):
                    host, _, port = fields[1].rpartition(":")
                    found.append(Socket(protocol, _address(host), int(port, 16), fields[9]))
    return tuple(found) if seen else None


def _address(text: str) -> str:
    """Parse an address of /proc/net: words of four bytes in the machine's byte order."""
    raw = bytes.fromhex(text)
    words = [raw[place : place + 4] for place in range(0, len(raw), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return str(ipaddress.ip_address(b"".join(words)))
