"""A front door in the lab with a fake engine behind it, and a client outside of the lab."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.machine.haproxy import Haproxy
from stackctl.units.proxy_unit import ADMIN, KEYS, ProxyFiles, proxy_service, render_proxy
from stackctl.values.proxy import Proxy, key_digest

from . import look
from .conftest import Seat
from .lab import DOOR_IMAGE, Lab

STACK = "front"
PORT = 8080
ENGINE_PORT = 18080
ENGINE = "/srv/fakeengine.py"
_NETWORK = 0x40000000  # CLONE_NEWNET


@dataclass(frozen=True)
class Reply:
    """The answer to a request, and the seconds that it took."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    seconds: float

    @property
    def json(self) -> Any:
        """Return the body read as JSON."""
        return json.loads(self.body)


class Front:
    """A front door of one user, and the engines that the test starts behind it."""

    def __init__(self, seat: Seat) -> None:
        """Prepare the folder and the engine; ``start`` starts the door."""
        self.seat = seat
        self.lab = seat.lab
        self.service = proxy_service(STACK)
        self.folder = f"{seat.state}/doors/{STACK}"
        self.admin = Haproxy(look.lab_path(self.lab, f"{self.folder}/{ADMIN}"))
        self._engines: list[subprocess.Popen[str]] = []
        self._clients = ThreadPoolExecutor(100)
        look.put(self.lab, ENGINE, (Path(__file__).parent / "fakeengine.py").read_bytes())

    def start(self, *, keys: Sequence[str] = (), **given: Any) -> ProxyFiles:
        """Install the door as a deployment does, and start it."""
        seat, image = self.seat, ("podman", "image", "inspect", "--format={{.Id}}", DOOR_IMAGE)
        values: dict[str, Any] = {"port": PORT, "engine_port": ENGINE_PORT, "hold_s": 20}
        values |= {"health_path": "/health", "key": bool(keys)}
        door = Proxy(**values | given, image=seat.run(*image).stdout.strip())
        files = render_proxy(
            STACK,
            door,
            scope="system" if seat.user == "root" else "user",
            podman=seat.run("podman", "--version").stdout.split()[-1],
            folder=self.folder,
        )
        seat.run("mkdir", "-p", "-m", "700", self.folder, f"{self.folder}/{ADMIN}")
        for file in files.files:
            self.lab.write(f"{self.folder}/{file.name}", file.text, user=seat.user)
        if keys:
            digests = "".join(f"{key_digest(key)}\n" for key in keys)
            self.lab.write(f"{self.folder}/{KEYS}", digests, user=seat.user)
        seat.run("chmod", "-R", "go=", self.folder)
        self.lab.write(f"{seat.units}/{STACK}/{files.unit.name}", files.unit.text, user=seat.user)
        seat.systemctl("daemon-reload")
        seat.systemctl("start", self.service)
        return files

    def engine(self, port: int = ENGINE_PORT, name: str = "fake") -> subprocess.Popen[str]:
        """Start an engine and wait until it answers."""
        words = ["python3", ENGINE, str(port), name]
        process = self.lab.spawn(words, user=self.seat.user)
        self._engines.append(process)
        look.wait_for("the engine answers", lambda: self._answers(port))
        return process

    def _answers(self, port: int) -> bool:
        try:
            return self.ask("GET", "/health", port=port).status == 200
        except OSError:
            return False

    def ask(
        self,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        body: Any = None,
        *,
        key: str | None = None,
        port: int = PORT,
    ) -> Reply:
        """Send one request on a connection of its own."""
        connection = connect(self.lab, port)
        try:
            return ask(connection, method, path, body, key=key)
        finally:
            connection.close()

    def later(self, *arguments: Any, **named: Any) -> Future[Reply]:
        """Send the same request in the background."""
        return self._clients.submit(self.ask, *arguments, **named)

    def stop(self) -> None:
        """Stop the engines, the clients and the door."""
        self._clients.shutdown()
        for process in self._engines:
            process.kill()
            process.communicate()
        self.seat.systemctl("stop", self.service, check=False)


def connect(lab: Lab, port: int) -> http.client.HTTPConnection:
    """Connect to a port of the lab's loopback, which is not the loopback of this process."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    problems: list[Exception] = []

    def inside() -> None:
        # A socket stays in the network namespace in which its thread created it.
        here = os.open(f"/proc/{lab.pid}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(here, _NETWORK) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            connection.connect()
        except Exception as problem:
            problems.append(problem)
        finally:
            os.close(here)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(
    connection: http.client.HTTPConnection,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: Any = None,
    *,
    key: str | None = None,
) -> Reply:
    """Send one request on a connection that may have served others."""
    began = time.monotonic()
    data = json.dumps(body or {}) if method == "POST" else None
    connection.request(
        method, path, data, {} if key is None else {"Authorization": f"Bearer {key}"}
    )
    answer = connection.getresponse()
    text = answer.read()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(answer.status, text, headers, time.monotonic() - began)


def tokens(lab: Lab, body: Any, port: int = PORT) -> Iterator[tuple[float, str]]:
    """Yield the events of a streamed answer: seconds since the request, and text."""
    connection = connect(lab, port)
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: "):
                yield time.monotonic() - began, line[6:].decode().strip()
    finally:
        connection.close()
