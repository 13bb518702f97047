"""The front door's admin socket: hold, release and move the engine; count requests; change keys."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stackctl.errors import StackctlError
from stackctl.values.proxy import key_digest

#: Names in templates/haproxy.cfg.j2.
_BACKEND = "engine"
_SERVER = "engine/engine"
_SOCKET = "admin.sock"
_KEYS = "/door/keys"

#: The answer to "show stat" is about 3 KiB.
_MOST_BYTES = 2**20
#: HAProxy refuses commands longer than its buffer (16 KiB); a digest takes about 90 bytes.
_KEYS_AT_ONCE = 100

ProxyState = Literal["up", "down", "held"]


@dataclass(frozen=True)
class Traffic:
    """Requests at this moment: ``running`` in the engine, ``waiting`` in the front door."""

    running: int
    waiting: int


@dataclass(frozen=True)
class QueueStats:
    """The number of requests that had to wait since ``hold``, and the longest wait in seconds.

    Requests that still wait count, too.
    """

    requests: int
    longest_s: float


class Haproxy:
    """The front door whose admin socket is in a folder of the host.

    Every method raises StackctlError if the door does not run, does not answer in time, or refuses
    the command. Each command is one connection; none is kept open.
    """

    def __init__(self, admin: Path, *, timeout_s: float = 5) -> None:
        self._admin = admin
        self._timeout_s = timeout_s

    def state(self) -> ProxyState:
        """Return the state of the door: new requests pass only in the state "up".

        They wait if it is "down" (the engine is not healthy) or "held" (after hold()).
        """
        status = self._stats().get(_SERVER, {}).get("status", "")
        if not status:
            raise self._failed("no statistics")
        if status.startswith("MAINT"):
            return "held"
        return "up" if status.startswith("UP") else "down"

    def port(self) -> int | None:
        """Return the port of 127.0.0.1 that gets the requests; None if HAProxy reports none."""
        address = self._stats().get(_SERVER, {}).get("addr") or ""
        port = address.rpartition(":")[2]
        return int(port) if port.isdecimal() else None

    def hold(self) -> None:
        """Hold new requests back; those in the engine go on. Resets ``queue_stats``."""
        self._order(f"waited reset; set server {_SERVER} state maint")

    def release(self, *, healthy: bool = True) -> None:
        """End hold(). A healthy engine gets the waiting requests at once (20 ms).

        With ``healthy`` False it gets them when the door's own health check succeeds (1 s).
        """
        order = f"set server {_SERVER} state ready"
        self._order(order if healthy else f"{order}; set server {_SERVER} health down")

    def set_backend_port(self, port: int) -> None:
        """Send requests and health checks to another port of 127.0.0.1.

        Call it while requests are held. It lasts until the door restarts and reads haproxy.cfg.
        """
        said = self._ask(f"set server {_SERVER} addr 127.0.0.1 port {port}")
        if "nothing changed" not in said and "port changed from" not in said:
            raise self._failed(said)

    def traffic(self) -> Traffic:
        """Return the number of requests that run in the engine, and of those that wait.

        A client that disconnected while it waited is counted until its turn comes.
        """
        stats = self._stats()
        running = self._sessions(stats, _SERVER)
        # The backend counts a request that was sent back to wait twice.
        twice = self._sessions(stats, f"{_BACKEND}/again")
        all_of_them = self._sessions(stats, f"{_BACKEND}/BACKEND")
        return Traffic(running, max(0, all_of_them - running - twice))

    def queue_stats(self) -> QueueStats:
        """Return the number and the longest wait of requests held back since the last hold()."""
        said = self._ask("waited")
        match = re.fullmatch(r"(\d+) ([\d.]+)", said)
        if match is None:
            raise self._failed(said)
        return QueueStats(int(match[1]), float(match[2]))

    def replace_keys(self, keys: Iterable[str]) -> None:
        """Replace all accepted API keys by these, in one step; the caller writes the key file.

        Only for a door that checks keys. If it fails, the old keys stay valid.
        """
        said = self._ask(f"prepare acl {_KEYS}")
        match = re.search(r"New version created: (\d+)", said)
        if match is None:
            raise self._failed(said)
        version = f"@{match[1]}"
        digests = [key_digest(key) for key in keys]
        for place in range(0, len(digests), _KEYS_AT_ONCE):
            part = digests[place : place + _KEYS_AT_ONCE]
            self._order("; ".join(f"add acl {version} {_KEYS} {digest}" for digest in part))
        self._order(f"commit acl {version} {_KEYS}")

    def _sessions(self, stats: dict[str, dict[str, str]], name: str) -> int:
        try:
            return int(stats[name]["scur"])
        except (KeyError, ValueError):
            raise self._failed(f"no statistics of {name}") from None

    def _stats(self) -> dict[str, dict[str, str]]:
        """Return the lines of "show stat" by proxy/server; values are as printed."""
        header, *lines = self._ask("show stat").removeprefix("# ").splitlines() or [""]
        rows = (dict(zip(header.split(","), line.split(","), strict=False)) for line in lines)
        return {f"{row.get('pxname')}/{row.get('svname')}": row for row in rows}

    def _order(self, commands: str) -> None:
        """Send commands whose answer is empty if they succeed."""
        if said := self._ask(commands):
            raise self._failed(said)

    def _failed(self, said: str) -> StackctlError:
        return StackctlError(
            "the front door refused a command",
            details=said.splitlines()[:5],
            hint="restart it, then stackctl status",
        )

    def _ask(self, commands: str) -> str:
        """Send one line of commands and return the answer without surrounding blanks."""
        parts: list[bytes] = []
        try:
            folder = os.open(self._admin, os.O_PATH | os.O_DIRECTORY)
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(self._timeout_s)
                    # A socket's path has at most 107 bytes; a state folder's may be longer.
                    connection.connect(f"/proc/self/fd/{folder}/{_SOCKET}")
                    connection.sendall(commands.encode() + b"\n")
                    while part := connection.recv(65536):
                        parts.append(part)
                        if sum(map(len, parts)) > _MOST_BYTES:
                            raise self._failed("more than 1 MiB of answer")
            finally:
                os.close(folder)
        except OSError as error:
            raise StackctlError(
                f"the front door does not answer: {error.strerror or 'no answer in time'}",
                hint=f"its admin socket is {self._admin / _SOCKET}",
            ) from None
        return b"".join(parts).decode("utf-8", "replace").strip()
