"""Streamed HTTP answers, many at a time, each piece with the moment at which it arrived.

One thread waits for all of them (epoll). The moment is the kernel's own (SO_TIMESTAMPNS): it stays
right when this process gets no processor, since an engine on the CPU uses all of them
(docs/decisions/0013-measuring.md has the figures).
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

#: Of asm-generic/socket.h; Python's socket module has no name for it. Its message is a timespec.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")
_CONNECT_S = 10
_MOST_BYTES = 256 * 2**10
#: How an answer in chunks ends (RFC 9112, 7.1); no event of JSON holds a bare CR LF.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
#: A stamp further off than this is of a clock that was set meanwhile.
_STRANGE_S = 60.0


@dataclass
class Exchange:
    """One request and what came back: ``pieces`` are (moment, bytes) as they arrived, moments as of
    time.perf_counter. ``error`` says why there is no more; HTTP errors are answers too."""

    number: int
    began: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None


class Streams:
    """Exchanges with one server. Use as a context manager: what is open at its end is cut off."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """Talk to the server at URL (http), with an API key where one is asked for."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise StackctlError(f"not an http address: {url}")
        self._address = (parts.hostname, parts.port or 80)
        self._host = parts.netloc
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""
        self._epoll = select.epoll()
        # The kernel turns stamping on when the first socket asks for it, a moment late, and off
        # with the last one: this one keeps it on between requests.
        self._stamping = socket.socket()
        _stamp(self._stamping)
        self._open: dict[int, tuple[socket.socket, Exchange]] = {}
        #: Seconds between the arrival of each piece and its reading here; and since when.
        self.lags: list[float] = []
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._epoll.close()
        self._stamping.close()

    @property
    def cpu_share(self) -> float:
        """The share of one processor that this process used since the beginning."""
        passed = time.perf_counter() - self._began
        return (time.process_time() - self._cpu) / passed if passed > 0 else 0.0

    def __len__(self) -> int:
        return len(self._open)

    def post(self, path: str, body: bytes, number: int = 0) -> Exchange | None:
        """Send a request; ``number`` is the caller's. None, or what failed at once.

        The moment it began is that before connecting: what a client waits for.
        """
        exchange = Exchange(number, time.perf_counter())
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
            exchange.ended = time.perf_counter()
            refused = isinstance(error, ConnectionRefusedError)
            exchange.error = "connection refused" if refused else _reason(error)
            return exchange
        self._open[connection.fileno()] = (connection, exchange)
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        return None

    def ended(self, wait_s: float) -> Iterator[Exchange]:
        """Read what comes within ``wait_s`` seconds at most; the exchanges that ended by it."""
        events = self._epoll.poll(wait_s)
        offset = time.time() - time.perf_counter()
        for descriptor, _ in events:
            connection, exchange = self._open[descriptor]
            try:
                data, told, _, _ = connection.recvmsg(_MOST_BYTES, 64)
            except BlockingIOError:
                continue
            except OSError as error:
                exchange.error = _reason(error)
                data, told = b"", []
            now = time.perf_counter()
            if data:
                moment = _moment(told, offset, now)
                self.lags.append(now - moment)
                exchange.pieces.append((moment, data))
                if not data.endswith(_LAST_CHUNK) and data != _LAST_CHUNK[2:]:
                    continue
            exchange.ended = exchange.pieces[-1][0] if data else now
            self._close(descriptor)
            yield exchange

    def cut(self, older_than_s: float | None = None) -> tuple[Exchange, ...]:
        """Give up the exchanges that run, or those that began so long ago, and return them."""
        now = time.perf_counter()
        late = [
            descriptor
            for descriptor, (_, exchange) in self._open.items()
            if older_than_s is None or now - exchange.began > older_than_s
        ]
        found = []
        for descriptor in late:
            exchange = self._open[descriptor][1]
            exchange.ended, exchange.error = now, "cut off"
            self._close(descriptor)
            found.append(exchange)
        return tuple(found)

    def _close(self, descriptor: int) -> None:
        connection, _ = self._open.pop(descriptor)
        self._epoll.unregister(descriptor)
        connection.close()


def _stamp(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # without it, the moment of reading is taken
        connection.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def _moment(told: list[tuple[int, int, bytes]], offset: float, now: float) -> float:
    """When the kernel got the data; ``now`` where it does not say."""
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
