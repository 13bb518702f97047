"""A model hub on loopback with the routes of Hugging Face that a download uses, and with faults.

It speaks real HTTP on two ports: the hub, and the CDN to which the hub redirects. Tests can thus
check that secrets do not reach the second one. Tests add faults, each for a number of requests.

It also runs by hand and in the lab, with the standard library alone:

    python3 tests/hub.py ORG/REPO=FOLDER... [--port 8600] [--speed BYTES_S]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Larger files are named by their SHA-256, as with git-lfs, and come from the CDN.
LFS_BYTES = 1000
CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """A fault of the next ``times`` requests whose path matches ``path``.

    ``status`` replaces the answer's status, with ``headers``. ``cut`` closes the connection after
    so many bytes of a body. ``shift`` sends a range that begins so many bytes later, of the same
    length. ``length`` is added to Content-Length. ``flip`` changes the byte of the file at that
    offset. ``whole`` ignores Range. ``chunked`` sends no length. ``together`` waits until so many
    requests have come.
    """

    path: str
    times: int = 1_000_000
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    shift: int = 0
    length: int = 0
    flip: int | None = None
    whole: bool = False
    chunked: bool = False
    together: threading.Barrier | None = None


@dataclass(frozen=True)
class Request:
    """A request with its port (hub or CDN), and the bytes of the body that were sent."""

    cdn: bool
    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    sent: int


@dataclass
class Repo:
    """One revision of a repository, with the files that hold its content."""

    files: dict[str, Path]
    commit: str
    private: bool = False
    gated: bool = False


class Hub:
    """A running hub. Private and gated repositories require ``token``."""

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder = folder
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self._requests: list[Request] = []
        self._answering = 0
        #: The number of bodies that are being sent, and the highest number at the same time.
        self.sending = self.most_at_once = 0
        self.token = "hf_secretsecretsecret"
        self.answers: dict[str, bytes] = {}
        #: Bytes per second for each connection; None means no limit.
        self.speed: float | None = None
        #: Bytes of bodies that are sent before the hub stops sending; None means all.
        self.hold: int | None = None
        #: The CDN's ETag of all files. Another ETag means another version of the files.
        self.etag = '"1"'
        self._digests: dict[tuple[str, int, int], tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        self._stopped = threading.Event()
        self._servers = [self._serve(port, cdn=False), self._serve(0, cdn=True)]

    def _serve(self, port: int, *, cdn: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "cdn": cdn})
        server = _Server(("127.0.0.1", port), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    @property
    def url(self) -> str:
        """Return the address of the hub, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        """Return the address of the CDN."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(self, name: str, files: Mapping[str, bytes | Path], **options: bool) -> Repo:
        """Add a repository ORG/REPO with these files, or another commit of it."""
        here: dict[str, Path] = {}
        for path, content in files.items():
            if isinstance(content, bytes):
                digest = hashlib.sha256(content).hexdigest()
                place = self.folder / digest
                place.write_bytes(content)
                content = place
            here[path] = content
        names = json.dumps([name, {k: (str(v), v.stat().st_size) for k, v in here.items()}])
        repo = Repo(here, hashlib.sha1(names.encode()).hexdigest(), **options)
        self.repos[name] = repo
        return repo

    @property
    def requests(self) -> list[Request]:
        """Return the requests after all answers have ended: a client may end before the server."""
        end = time.monotonic() + 5
        while self._answering and time.monotonic() < end:
            time.sleep(0.002)
        return self._requests

    def begin(self) -> None:
        """Count a request that is being answered."""
        with self._lock:
            self._answering += 1

    def end(self, request: Request) -> None:
        """Store an answered request."""
        with self._lock:
            self._answering -= 1
            self._requests.append(request)

    @contextlib.contextmanager
    def body(self) -> Iterator[None]:
        """Count a body that is being sent."""
        with self._lock:
            self.sending += 1
            self.most_at_once = max(self.most_at_once, self.sending)
        try:
            yield
        finally:
            with self._lock:
                self.sending -= 1

    def fault(self, path: str, **what: object) -> None:
        """Add a fault of the next requests: see Fault."""
        self.faults.append(Fault(path, **what))  # type: ignore[arg-type]

    def sent(self, pattern: str = ".*") -> int:
        """Return the bytes of bodies that were sent for matching paths."""
        return sum(r.sent for r in self.requests if re.fullmatch(pattern, r.path))

    def digests(self, path: Path) -> tuple[str, str]:
        """Return the SHA-256 of a file, and its name as a git blob."""
        found = path.stat()
        key = (str(path), found.st_size, found.st_mtime_ns)
        with self._hashing:
            if key not in self._digests:
                sha = hashlib.sha256()
                blob = hashlib.sha1(b"blob %d\0" % found.st_size)
                with path.open("rb") as file:
                    while piece := file.read(1 << 20):
                        sha.update(piece)
                        blob.update(piece)
                self._digests[key] = (sha.hexdigest(), blob.hexdigest())
            return self._digests[key]

    def take_fault(self, path: str) -> Fault | None:
        """Return the first fault of that path, and count it."""
        with self._lock:
            for number, fault in enumerate(self.faults):
                if re.search(fault.path, path):
                    if fault.times == 1:
                        del self.faults[number]
                    else:
                        left = dataclasses.replace(fault, times=fault.times - 1)
                        self.faults[number] = left
                    return fault
        return None

    def close(self) -> None:
        """Stop the servers."""
        self._stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def let_out(self, count: int) -> None:
        """Count sent bytes, and wait while ``hold`` stops the sending."""
        with self._lock:
            if self.hold is not None:
                self.hold -= count
        while self.hold is not None and self.hold <= 0 and not self._stopped.is_set():
            self.pause(0.01)

    def pause(self, seconds: float) -> None:
        """Wait so many seconds, or until the hub is closed."""
        self._stopped.wait(seconds)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    cdn: bool
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.begin()
        self.sent = 0
        self.said = 0
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(path)
        try:
            if fault is not None and fault.together is not None:
                fault.together.wait(10)
            if fault is not None and fault.status is not None:
                self._say(fault.status, b'{"error":"as asked"}', fault.headers)
            elif path in self.hub.answers:
                self._say(200, self.hub.answers[path], {"Content-Type": "application/json"})
            elif self.cdn:
                self._blob(path, fault)
            else:
                self._hub(path, fault)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            told = Request(
                self.cdn, self.command, path, dict(self.headers.items()), self.said, self.sent
            )
            self.hub.end(told)

    def _hub(self, path: str, fault: Fault | None) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            return self._say(404, b"{}", {})
        name, revision = match[1], match[2]
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = token == self.hub.token
        if repo is None or (repo.private and not known):
            # The real hub does not reveal which of the two it is.
            code = 404 if known else 401
            return self._error(code, "RepoNotFound", "Repository not found")
        if token and not known:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if revision not in ("main", repo.commit, repo.commit[:7]):
            return self._error(404, "RevisionNotFound", "Invalid rev id: " + revision)
        if api:
            return self._info(name, repo)
        if repo.gated and not known:
            return self._error(401, "GatedRepo", f"Access to model {name} is restricted")
        place = repo.files.get(match[3])
        if place is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        sha, blob = self.hub.digests(place)
        headers = {"X-Repo-Commit": repo.commit}
        if place.stat().st_size < LFS_BYTES:
            return self._file(place, f'"{blob}"', headers, fault)
        headers |= {"X-Linked-Size": str(place.stat().st_size), "X-Linked-ETag": f'"{sha}"'}
        where = f"{self.hub.cdn}/cdn/{name}/{sha}/{place.name}"
        return self._say(302, b"", {**headers, "Location": where, "ETag": f'"{sha}"'})

    def _info(self, name: str, repo: Repo) -> None:
        siblings = []
        for path, place in repo.files.items():
            size = place.stat().st_size
            sha, blob = self.hub.digests(place)
            told: dict[str, object] = {"rfilename": path, "size": size, "blobId": blob}
            if size >= LFS_BYTES:
                told["lfs"] = {"sha256": sha, "size": size, "pointerSize": 134}
            siblings.append(told)
        info = {
            "id": name, "modelId": name, "sha": repo.commit, "private": repo.private,
            "gated": "auto" if repo.gated else False, "siblings": siblings,
        }  # fmt: skip
        self._say(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _blob(self, path: str, fault: Fault | None) -> None:
        match = re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{64})/.+", path)
        repo = self.hub.repos.get(match[1]) if match else None
        for place in repo.files.values() if repo and match else ():
            if self.hub.digests(place)[0] == match[2]:  # type: ignore[index]
                return self._file(place, self.hub.etag, {}, fault)
        return self._say(404, b"", {})

    def _file(
        self, place: Path, etag: str, headers: Mapping[str, str], fault: Fault | None
    ) -> None:
        size = place.stat().st_size
        first, last, status = 0, size - 1, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if wanted and same and not (fault and fault.whole):
            first = int(wanted[1])
            last = min(int(wanted[2] or size - 1), size - 1)
            if first >= size:
                return self._say(416, b"", {"Content-Range": f"bytes */{size}"})
            status = 206
            if fault:
                first, last = first + fault.shift, last + fault.shift
        length = last - first + 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if not (fault and fault.whole):
            self.send_header("Accept-Ranges", "bytes")
        if etag:
            self.send_header("ETag", etag)
        if fault and fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length + (fault.length if fault else 0)))
        self.end_headers()
        self.said = status
        if self.command != "HEAD":
            with self.hub.body():
                self._body(place, first, length, fault)
        return None

    def _body(self, place: Path, first: int, length: int, fault: Fault | None) -> None:
        most = length if fault is None or fault.cut is None else min(length, fault.cut)
        flip = fault.flip if fault else None
        begin = time.monotonic()
        if self.hub.speed:
            # A small buffer, as on a slow line: bytes in transit are lost if the reader is killed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        with place.open("rb") as file:
            at = first
            while self.sent < most:
                step = min(CHUNK if self.hub.speed else 1 << 22, most - self.sent)
                if fault and fault.chunked:
                    raw = os.pread(file.fileno(), step, at)
                    self.connection.sendall(b"%x\r\n%b\r\n" % (step, raw))
                elif flip is not None and at <= flip < at + step:
                    damaged = bytearray(os.pread(file.fileno(), step, at))
                    damaged[flip - at] ^= 0xFF
                    self.connection.sendall(damaged)
                else:
                    step = os.sendfile(self.connection.fileno(), file.fileno(), at, step)
                at += step
                self.sent += step
                self.hub.let_out(step)
                if self.hub.speed:
                    ahead = self.sent / self.hub.speed - (time.monotonic() - begin)
                    if ahead > 0:
                        self.hub.pause(ahead)
        if fault and fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if most < length or (fault and fault.length):
            self.close_connection = True

    def _error(self, status: int, code: str, text: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._say(
            status, json.dumps({"error": text}).encode(), {**headers, "X-Error-Message": text}
        )

    def _say(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.said = status
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent = len(body)


@contextlib.contextmanager
def hub(folder: Path, *, port: int = 0) -> Iterator[Hub]:
    """Yield a hub that stores contents given as bytes in a folder."""
    made = Hub(folder, port=port)
    try:
        yield made
    finally:
        made.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve folders as repositories until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repos", nargs="+", metavar="ORG/REPO=FOLDER")
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--speed", type=float, help="bytes a second for each connection")
    parser.add_argument("--gated", action="store_true", help="ask for the token")
    options = parser.parse_args(arguments)
    with hub(Path("/nonexistent"), port=options.port) as made:
        made.speed = options.speed
        for text in options.repos:
            name, _, folder = text.partition("=")
            found = sorted(p for p in Path(folder).rglob("*") if p.is_file())
            files: dict[str, bytes | Path] = {str(p.relative_to(folder)): p for p in found}
            made.add(name, files, gated=options.gated)
        print(f"HF_ENDPOINT={made.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
