"""Ask a hub for the metadata of a repository, its commit and its files; check a server's answers.

The answer is untrusted data: its size is limited, and a file name that could lead out of the store
makes stackctl refuse the whole repository.
"""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.http_download import ConnectionLost, Response, Transfer, host_of
from stackctl.sources.hub_cache import hub_home
from stackctl.sources.source_files import read_bytes
from stackctl.store.download_queue import DownloadRequest, RetryPolicy

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
#: The largest repositories have some thousand files, a few hundred bytes each.
_MOST_BYTES: Final = 16 << 20
_MOST_FILES: Final = 20_000
_MOST_SIZE: Final = 1 << 50
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,500}")
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})
_PATIENCE: Final = RetryPolicy(attempts=2)
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
#: The longest wait that a server may ask for; a longer one is cut to this.
_MOST_WAIT_S: Final = 300.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. Large files have ``sha256``; ``blob`` is the SHA-1 as a git blob."""

    path: str
    bytes: int
    sha256: str | None
    blob: str | None

    @property
    def name(self) -> str:
        """Return the name of its blob in the store, the same as that of the hub's own tools."""
        return self.sha256 or self.blob or ""


@dataclass(frozen=True)
class RepoInfo:
    """A repository at a commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


class _Lfs(msgspec.Struct):
    sha256: str
    size: int


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: _Lfs | None = None


class _Info(msgspec.Struct):
    sha: str
    siblings: list[_Sibling]


def file_url(base: str, info: RepoInfo, file: RemoteFile) -> str:
    """Return the URL of a file at the commit of a repository; ``base`` is that of the hub."""
    return f"{base}/{info.repo}/resolve/{info.commit}/{quote(file.path)}"


def hub_endpoint() -> str:
    """Return the hub's URL: HF_ENDPOINT, or Hugging Face's.

    Raises:
        StackctlError: HF_ENDPOINT is not the URL of a server (exit 2).
    """
    text = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(text)
        right = parts.scheme in ("http", "https") and parts.hostname and not parts.query
    except ValueError:
        right = False
    if not right:
        raise StackctlError(
            f"HF_ENDPOINT is not the address of a hub: {text[:100]!r}",
            hint=f"such as {DEFAULT_ENDPOINT}",
            exit_code=ExitCode.USAGE,
        )
    return text


def offline_variable() -> str | None:
    """Return the name of the variable that forbids requests to a hub, or None."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in _TRUE), None)


def require_online() -> None:
    """Raise StackctlError if the environment forbids requests to a hub (HF_HUB_OFFLINE)."""
    if name := offline_variable():
        raise StackctlError(
            f"nothing is fetched: {name} is set",
            hint=f"unset {name}, or take the model from another machine: stackctl model import",
        )


def hub_token(url: str) -> str | None:
    """Return the user's token for a hub, from the places of the hub's own tools, or None.

    None, too, for another machine without https, because the token would be sent in the clear.

    Raises:
        StackctlError: the variable or file contains no valid token. Its text is not shown.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if text := os.environ.get(name, "").strip():
            return _checked(text, name)
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return None
    named = os.environ.get("HF_TOKEN_PATH")
    path = Path(named).expanduser() if named else hub_home() / "token"
    if not os.path.exists(path):  # noqa: PTH110 - False, too, if unreadable
        return None
    text = read_bytes(path, 10_000).decode("utf-8", "replace").strip()
    return _checked(text, str(path)) if text else None


def _checked(text: str, where: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise StackctlError(
            f"{where} contains no valid token", hint="one line, letters, digits and _ only"
        )
    return text


def query_repo(
    repo: str,
    revision: str,
    *,
    retries: RetryPolicy = _PATIENCE,
    report_wait: Callable[[str], None] = lambda _: None,
) -> RepoInfo:
    """Ask the hub for the commit and the files of a repository at a revision.

    ``report_wait`` is called with the reason before each wait, which may last 300 s.

    Raises:
        StackctlError: the hub does not answer, has no such revision, requires a token, or its
            answer is invalid.
    """
    require_online()
    base = hub_endpoint()
    url = f"{base}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    what = f"{repo}@{revision}" if revision != "main" else repo
    with Transfer() as transfer:
        response = _asked(transfer, url, what, hub_token(base), retries, report_wait)
        raw = response.read(_MOST_BYTES)
    try:
        info = msgspec.json.decode(raw, type=_Info)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise StackctlError(
            f"{host_of(base)} does not answer like a hub: {str(error)[:200]}",
            hint="HF_ENDPOINT names it" if os.environ.get("HF_ENDPOINT") else None,
        ) from None
    return RepoInfo(repo, *_checked_info(repo, info))


def _asked(
    transfer: Transfer,
    url: str,
    what: str,
    secret: str | None,
    retries: RetryPolicy,
    report_wait: Callable[[str], None],
) -> Response:
    for attempt in range(retries.attempts + 1):
        last = attempt == retries.attempts
        wait = 0.0
        try:
            response = transfer.get(url, {"Accept": "application/json"}, secret=secret)
        except ConnectionLost as error:
            if last:
                error.hint = error.hint or (
                    "without a network: stackctl model import, or --model file:/path/to/model.gguf"
                )
                raise
            why = error.message
        else:
            if response.status == 200:
                return response
            if last or (response.status != 429 and response.status < 500):
                raise status_error(what, response)
            wait = retry_after(response.header("Retry-After"))
            why = f"{host_of(response.url)} is busy ({response.status})"
        wait = max(wait, min(retries.most_s, retries.first_s * 2.0**attempt))
        report_wait(f"{why}: once more in {wait:.0f} s")
        time.sleep(wait)
    raise AssertionError("unreachable")


def _checked_info(repo: str, info: _Info) -> tuple[str, tuple[RemoteFile, ...]]:
    if not _COMMIT.fullmatch(info.sha):
        raise _hostile(repo, f"its commit is {info.sha[:60]!r}")
    if len(info.siblings) > _MOST_FILES:
        raise _hostile(repo, f"it has {len(info.siblings)} files")
    files = []
    for sibling in info.siblings:
        require_plain_path(sibling.rfilename, repo)
        size = sibling.lfs.size if sibling.lfs else sibling.size
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if size is None or not 0 <= size < _MOST_SIZE:
            raise _hostile(repo, f"{sibling.rfilename} has {size} bytes")
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise _hostile(repo, f"the SHA-256 of {sibling.rfilename} is {sha256[:80]!r}")
        if sibling.blobId is not None and not _COMMIT.fullmatch(sibling.blobId):
            raise _hostile(repo, f"the blob of {sibling.rfilename} is {sibling.blobId[:60]!r}")
        if sha256 is None and sibling.blobId is None:
            raise _hostile(repo, f"{sibling.rfilename} has no hash")
        files.append(RemoteFile(sibling.rfilename, size, sha256, sibling.blobId))
    if len({file.path for file in files}) != len(files):
        raise _hostile(repo, "it names a file twice")
    return info.sha, tuple(files)


def require_plain_path(path: str, where: str) -> None:
    """Raise StackctlError for a path that could lead out of its folder, or is not a file name."""
    parts = path.split("/")
    plain = (
        path.isprintable()
        and len(path.encode("utf-8", "replace")) <= 1000
        and "\\" not in path
        and all(part not in ("", ".", "..") for part in parts)
        and all(len(part.encode("utf-8", "replace")) <= 250 for part in parts)
    )
    if not plain:
        raise _hostile(where, f"{path[:100]!r} is not a valid file name")


def _hostile(repo: str, what: str) -> StackctlError:
    return StackctlError(
        f"{repo} is refused: {what}", hint="nothing was fetched; report it to the hub"
    )


class HubRefusal(StackctlError):
    """A server's answer that a file or repository does not exist, or is not for this user."""


def status_error(name: str, response: Response) -> StackctlError:
    """Return the error for an HTTP status that another attempt does not change.

    It is a HubRefusal for the statuses 401, 403 and 404.
    """
    where, status = host_of(response.url), response.status
    code = response.header("X-Error-Code") or ""
    if status in (401, 403):
        if code == "GatedRepo":
            return HubRefusal(
                f"{name}: its owner asks for consent ({status})",
                hint=f"ask for access on {where}, then log in here: a token in HF_TOKEN, or in\n"
                "the file that HF_TOKEN_PATH names (usually ~/.cache/huggingface/token)",
            )
        return HubRefusal(
            f"{name}: {where} refuses it ({status}): private, or there is no such repository",
            hint="a token in HF_TOKEN or in ~/.cache/huggingface/token opens private ones;\n"
            "one that has expired opens nothing",
        )
    if status == 404:
        what = {"RevisionNotFound": "has no such revision", "EntryNotFound": "has no such file"}
        return HubRefusal(f"{name}: {where} {what.get(code, 'does not know it')} (404)")
    return StackctlError(f"{name}: {where} answers with status {status}")


def check_redirect(request: DownloadRequest, answer: Response) -> None:
    """Check that size and hash in a hub's redirect are those of its file list.

    Raises:
        StackctlError: they differ, so the file has changed on the hub.
    """
    size, etag = answer.header("X-Linked-Size"), (answer.header("X-Linked-ETag") or "").strip('"')
    hashed = request.sha256 is not None and re.fullmatch(r"[0-9a-f]{64}", etag)
    if (size and size != str(request.size)) or (hashed and etag != request.sha256):
        raise StackctlError(
            f"{request.name} has changed on {host_of(answer.url)} since the download was planned",
            hint="look again (stackctl model show), or name a commit: hf:ORG/REPO@COMMIT",
        )


def check_range(size: int, response: Response, first: int, last: int) -> None:
    """Check that a partial answer holds the requested bytes of a file of ``size`` bytes.

    Raises ConnectionLost if it does not.
    """
    where = host_of(response.url)
    told = response.header("Content-Range") or ""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told)
    if match is None or (int(match[1]), int(match[3])) != (first, size):
        told = ascii(told[:60])[1:-1] or "no range"
        raise ConnectionLost(f"{where} sent {told}, not bytes {first}-{last}/{size}")
    if response.length is not None and response.length != last - first + 1:
        raise ConnectionLost(f"{where} would send {response.length} bytes, not {last - first + 1}")


def retry_after(text: str | None) -> float:
    """Return the seconds of a Retry-After, a number or a date (RFC 9110, 10.2.3), at most 300.

    0 if the header is absent or invalid.
    """
    if text is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,6}", text.strip()):
        return min(float(text), _MOST_WAIT_S)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(0.0, when - time.time()), _MOST_WAIT_S)
