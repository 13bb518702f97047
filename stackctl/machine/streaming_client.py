"""Streamed HTTP answers, many at a time, each piece with the time of its arrival.

One thread waits for all of them (epoll). The time is the kernel's own (SO_TIMESTAMPNS). So it stays
right when this process gets no CPU because an engine uses all of them (measured in
docs/decisions/0013-measuring.md).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from stackctl.errors import StackctlError

#: From asm-generic/socket.h: Python's socket module lacks the name. The message is a timespec.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")
_CONNECT_S = 10
_MOST_BYTES = 256 * 2**10
#: The end of an answer in chunks (RFC 9112, 7.1); an event of JSON contains no bare CR LF.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
#: A time stamp that is further off comes from a clock that was set meanwhile.
_STRANGE_S = 60.0


@dataclass
class StreamedRequest:
    """One request and its answer so far.

    ``pieces`` are pairs of arrival time and bytes. All times are seconds of time.perf_counter.
    ``error`` is the reason why the exchange ended early; HTTP errors are answers, too.
    """

    number: int
    began: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None


class StreamingClient:
    """Exchanges with one server. A context manager, whose end cuts off the open exchanges."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """Prepare requests to the server at an http URL, with an API key if one is given."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise StackctlError(f"not an http address: {url}")
        self._address = (parts.hostname, parts.port or 80)
        self._host = parts.netloc
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""
        self._epoll = select.epoll()
        # The kernel turns time stamps on a moment after the first socket requests them, and off
        # with the last such socket. This socket keeps them on between requests.
        self._stamping = socket.socket()
        _stamp(self._stamping)
        self._open: dict[int, tuple[socket.socket, StreamedRequest]] = {}
        #: Seconds between the arrival of each piece and its reading here.
        self.lags: list[float] = []
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def __enter__(self) -> StreamingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._epoll.close()
        self._stamping.close()

    @property
    def cpu_share(self) -> float:
        """Return the CPU time of this process since the beginning, as a share of one CPU."""
        passed = time.perf_counter() - self._began
        return (time.process_time() - self._cpu) / passed if passed > 0 else 0.0

    def __len__(self) -> int:
        return len(self._open)

    def post(self, path: str, body: bytes, number: int = 0) -> StreamedRequest | None:
        """Send a request with the caller's ``number``. Return None, or the exchange if it failed.

        Its time begins before connecting, because a client waits for the connection, too.
        """
        request = StreamedRequest(number, time.perf_counter())
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Accept: text/event-stream\r\nConnection: close\r\n\r\n"
        ).encode()
        connection = None
        try:
            connection = socket.create_connection(self._address, _CONNECT_S)
            _stamp(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head + body)
            connection.setblocking(False)
        except OSError as error:
            if connection is not None:
                connection.close()
            request.ended = time.perf_counter()
            refused = isinstance(error, ConnectionRefusedError)
            request.error = "connection refused" if refused else _reason(error)
            return request
        self._open[connection.fileno()] = (connection, request)
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        return None

    def poll(self, wait_s: float) -> Iterator[StreamedRequest]:
        """Wait for data for up to ``wait_s`` seconds, read it, and yield ended exchanges."""
        events = self._epoll.poll(wait_s)
        offset = time.time() - time.perf_counter()
        for descriptor, _ in events:
            connection, request = self._open[descriptor]
            try:
                data, told, _, _ = connection.recvmsg(_MOST_BYTES, 64)
            except BlockingIOError:
                continue
            except OSError as error:
                request.error = _reason(error)
                data, told = b"", []
            now = time.perf_counter()
            if data:
                moment = _moment(told, offset, now)
                self.lags.append(now - moment)
                request.pieces.append((moment, data))
                if not data.endswith(_LAST_CHUNK) and data != _LAST_CHUNK[2:]:
                    continue
            request.ended = request.pieces[-1][0] if data else now
            self._close(descriptor)
            yield request

    def cancel(self, older_than_s: float | None = None) -> tuple[StreamedRequest, ...]:
        """Cut off open exchanges, all or those older than ``older_than_s``, and return them."""
        now = time.perf_counter()
        late = [
            descriptor
            for descriptor, (_, request) in self._open.items()
            if older_than_s is None or now - request.began > older_than_s
        ]
        found = []
        for descriptor in late:
            request = self._open[descriptor][1]
            request.ended, request.error = now, "cut off"
            self._close(descriptor)
            found.append(request)
        return tuple(found)

    def _close(self, descriptor: int) -> None:
        connection, _ = self._open.pop(descriptor)
        self._epoll.unregister(descriptor)
        connection.close()


def _stamp(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # without time stamps the time of reading is used
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def _moment(told: list[tuple[int, int, bytes]], offset: float, now: float) -> float:
    """Return the time at which the kernel received the data, or ``now`` without a time stamp."""
    for level, _, data in told:
        if level == socket.SOL_SOCKET and len(data) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(data)
            moment = seconds - offset + nanoseconds * 1e-9
            if now - _STRANGE_S < moment <= now:
                return float(moment)
    return now


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no connection in time"
    if isinstance(error, ConnectionError):
        return "the connection broke off"
    return error.strerror or type(error).__name__
