"""A small HTTP server that plays an engine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What a path answers: a status, a body (data becomes JSON), and how long it takes."""

    body: Any = field(default_factory=dict)
    status: int = 200
    wait_s: float = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Close the connection after these bytes of the body.
    cut: int | None = None


@dataclass
class Engine:
    """A running server: where it listens, and what it was asked."""

    port: int
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)


def chat(text: str | None = "Red, green, blue.", tokens: int = 6) -> Reply:
    return Reply(
        {"choices": [{"message": {"role": "assistant", "content": text}}],
         "usage": {"completion_tokens": tokens}}
    )  # fmt: skip


def models(*names: str) -> Reply:
    return Reply({"object": "list", "data": [{"id": name} for name in names]})


READY: Mapping[str, Reply] = {
    "/health": Reply({"status": "ok"}),
    "/v1/models": models("m"),
    "/v1/chat/completions": chat(),
}


@contextlib.contextmanager
def engine(replies: Mapping[str, Reply]) -> Iterator[Engine]:
    """Serve on a free port of 127.0.0.1; a path that is not listed is 404."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            state.requests.append((self.command, self.path, json.loads(sent) if sent else None))
            reply = replies.get(self.path, Reply({"error": "none"}, status=404))
            state.stopped.wait(reply.wait_s)
            raw = reply.body
            if isinstance(raw, str):
                raw = raw.encode()
            elif not isinstance(raw, bytes):
                raw = json.dumps(raw).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw if reply.cut is None else raw[: reply.cut])
            self.close_connection = True

        do_GET = do_POST = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    state = Engine(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until(ready: Any, timeout_s: float = 5) -> None:
    """Until a condition holds; fails after the time."""
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
