"""A real HTTP server on loopback that answers with events after known delays."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
#: Seconds to wait, then bytes to send; None closes the connection.
Step = tuple[float, bytes | None]
Answer = Callable[[dict[str, Any]], Sequence[Step]]


@dataclass
class Server:
    """Where it listens, the requests it got, and when it sent each piece (before and after)."""

    port: int
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    sent: list[tuple[float, float]] = field(default_factory=list)
    most: int = 0
    open: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def event(value: Any) -> bytes:
    raw = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def piece(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def completion(
    body: dict[str, Any], *, first_s: float = 0.0, gap_s: float = 0.0, cached: int = 0
) -> list[Step]:
    """As many tokens as were asked for; a word of the prompt is a token, the template adds 4."""
    tokens = body["max_tokens"]
    words = len(body["messages"][0]["content"].split()) + 4
    usage = {
        "prompt_tokens": words, "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
    steps: list[Step] = [(0, HEAD), (first_s, piece("a"))]
    steps += [(gap_s, piece("a")) for _ in range(tokens - 1)]
    last = (
        piece("", "length")
        + event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
        + event(b"[DONE]")
    )
    return [*steps, (0, last + b"0\r\n\r\n")]


@contextlib.contextmanager
def serve(answer: Answer) -> Iterator[Server]:
    """Serve on a free port of 127.0.0.1; ANSWER says what to send for the body of a request."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = Server(listener.getsockname()[1])
    lock, ended = threading.Lock(), threading.Event()
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            raw = b""
            while b"\r\n\r\n" not in raw:
                raw += connection.recv(65536)
            head, _, rest = raw.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            while len(rest) < int(fields.get("content-length", 0)):
                rest += connection.recv(65536)
            body = json.loads(rest) if rest else {}
            with lock:
                server.requests.append((first.split()[1], fields, body))
                server.open += 1
                server.most = max(server.most, server.open)
            steps = answer(body)
            left = len(steps)
            try:
                for wait_s, data in steps:
                    if ended.wait(wait_s) or data is None:
                        return
                    left -= 1
                    if not left:  # a client that has all of it may ask the next at once
                        with lock:
                            server.open -= 1
                    before = time.perf_counter()
                    connection.sendall(data)
                    with lock:
                        server.sent.append((before, time.perf_counter()))
            finally:
                if left:
                    with lock:
                        server.open -= 1

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threads.append(threading.Thread(target=one, args=(connection,)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield server
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()
