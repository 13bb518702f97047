"""A server whose delays are known: streams answers, each piece with the moment of its sending.

    python3 delays.py FIRST_S GAP_S PIECES        prints its port, serves until killed

One thread and no lock: what it sends late it says, so that only the client's error remains.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import re
import selectors
import socket
import sys
import time

ABSENT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
# As long as llama-server's.
FILLING = "x" * 200


def piece(moment: float, number: int) -> bytes:
    """One event with the moment in place of a token."""
    choice = {"index": 0, "delta": {"content": f"{moment:.9f}"}}
    return event({"choices": [choice], "id": str(number), "fingerprint": FILLING})


def end(pieces: int) -> bytes:
    """What ends an answer: a token for each piece was generated."""
    usage = {"prompt_tokens": 1, "completion_tokens": pieces, "total_tokens": pieces + 1}
    return event({"choices": [], "usage": usage}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def event(value: dict[str, object]) -> bytes:
    """A chunk with one event."""
    value = {"object": "chat.completion.chunk", **value}
    raw = b"data: " + json.dumps(value).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def request(connection: socket.socket) -> bytes:
    """A whole request: what is not read would reset the connection when it is closed."""
    raw = b""
    while part := connection.recv(65536):
        raw += part
        head, found, body = raw.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if found and len(body) >= (int(length[1]) if length else 0):
            break
    return raw


def main(first_s: float, gap_s: float, pieces: int) -> None:
    """Serve for ever."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    waiting: list[tuple[float, int, socket.socket, int]] = []
    number = 0
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        while waiting and waiting[0][0] <= time.perf_counter():
            due, _, connection, sent = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                if sent < pieces:
                    connection.sendall(piece(time.perf_counter(), sent))
                    number += 1
                    heapq.heappush(waiting, (due + gap_s, number, connection, sent + 1))
                    continue
                connection.sendall(end(pieces))
            connection.close()
        wait = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for key, _ in selector.select(wait):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(connection, selectors.EVENT_READ)
                continue
            asked = key.fileobj
            assert isinstance(asked, socket.socket)
            selector.unregister(asked)
            with contextlib.suppress(OSError):
                if b"/chat/completions " in request(asked):
                    asked.sendall(HEAD)
                    number += 1
                    # Spread over a gap: streams of a real engine come together, which is easier.
                    # One alone always waits the same.
                    offset = len(waiting) % 64 / 64 * gap_s
                    due = time.perf_counter() + first_s + offset
                    heapq.heappush(waiting, (due, number, asked, 0))
                    continue
                asked.sendall(ABSENT)
            asked.close()


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
