"""A small engine for the lab whose timing tests control: python3 fakeengine.py PORT [NAME].

It answers GET requests to any path, such as /health. POST /v1/... takes {"wait": seconds before the
answer, "tokens": n, "pause": seconds between them, "stream": bool} and returns size and headers of
the request.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = int(sys.argv[1])
NAME = sys.argv[2] if len(sys.argv) > 2 else "fake"


class Handler(BaseHTTPRequestHandler):
    """Answers as an engine."""

    protocol_version = "HTTP/1.1"
    #: Without it, tokens would wait for the client's acknowledgements.
    disable_nagle_algorithm = True
    running = 0
    cut_off = 0

    def log_message(self, format: str, *args: Any) -> None:
        """Print no log of requests."""

    def do_GET(self) -> None:
        """Send the path and the counters of requests."""
        seen = {"running": Handler.running, "cut_off": Handler.cut_off, "name": NAME}
        self._json({"path": self.path, **seen})

    def do_POST(self) -> None:
        """Send an answer in one piece or token by token."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        wish = json.loads(body or b"{}")
        Handler.running += 1
        try:
            self._pause(wish.get("wait", 0))
            if wish.get("stream"):
                self._stream(wish)
            else:
                headers = {name.lower(): value for name, value in self.headers.items()}
                self._json({"name": NAME, "bytes": len(body), "headers": headers})
        except OSError:
            Handler.cut_off += 1
            self.close_connection = True
        finally:
            Handler.running -= 1

    def _pause(self, seconds: float) -> None:
        """Wait for so long. Raise ConnectionResetError if the client leaves."""
        self.connection.settimeout(max(seconds, 0.001))
        try:
            if self.connection.recv(1) == b"":
                raise ConnectionResetError
        except TimeoutError:
            pass
        finally:
            self.connection.settimeout(None)

    def _stream(self, wish: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(wish.get("tokens", 5)):
            text = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            self._pause(wish.get("pause", 0.1))
        self.wfile.write(b"0\r\n\r\n")

    def _json(self, data: Any) -> None:
        raw = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


class Server(ThreadingHTTPServer):
    """Accepts many connections at once, and ignores clients that leave."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, address: Any) -> None:
        """Print nothing about clients that leave, such as health checks after the status line."""


threading.stack_size(256 * 1024)
Server(("127.0.0.1", PORT), Handler).serve_forever()
