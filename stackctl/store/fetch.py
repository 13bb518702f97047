"""Resolve a source to the files of a model, and download them into the store."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.http_download import Transfer, host_of
from stackctl.quantity import format_bytes
from stackctl.sources.hub_cache import HubSource, cache_folder, parse_remote
from stackctl.sources.source_files import open_regular_file
from stackctl.store import hub, lockfile, partial_file
from stackctl.store.download import download_files
from stackctl.store.download_queue import (
    DEFAULT_SETTINGS,
    DownloadedFile,
    DownloadRequest,
    DownloadSettings,
)
from stackctl.store.download_rate import ProgressCallback, ProgressMeter, no_progress
from stackctl.store.hub_repository import Repository
from stackctl.store.manifest import Manifest, digest, file_record, record_time
from stackctl.store.remote_models import choose_model
from stackctl.values.model_store import ModelLock, StoredModel

#: Bytes that stay free on the disk.
_SPARE_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class DownloadPlan:
    """The model of a source, and the files that the store lacks.

    ``present`` are verified blobs in the store, ``unsure`` blobs that another tool has stored or
    that have changed since. ``todo`` are the files to download, and ``missing_bytes`` the bytes of
    them that are not on the disk yet. ``revision`` is the name for the commit (None: none). ``hub``
    is the only server that gets the user's token (None: a file of another web server).
    """

    source: str
    repo: str
    commit: str | None
    revision: str | None
    wanted: tuple[DownloadRequest, ...]
    paths: tuple[tuple[str, str], ...]
    present: tuple[DownloadedFile, ...]
    unsure: tuple[DownloadRequest, ...]
    todo: tuple[DownloadRequest, ...]
    missing_bytes: int
    hub: str | None

    @property
    def bytes(self) -> int:
        """Return the size of the whole model in bytes."""
        return sum(file.size for file in self.wanted)


def require_remote(source: str) -> HubSource:
    """Parse a source. Raises StackctlError (exit 2) if it cannot be fetched."""
    found = parse_remote(source)
    if found is None:
        raise StackctlError(
            f"cannot fetch {source}: unsupported source",
            hint="hf:ORG/REPO[@REV][:QUANT or FILE] or https://.../NAME.gguf; what lies on this "
            "machine: stackctl model import",
            exit_code=ExitCode.USAGE,
        )
    return found


def plan_download(
    source: str,
    manifest: Manifest,
    lock: ModelLock | None = None,
    report_wait: Callable[[str], None] = lambda _: None,
) -> DownloadPlan:
    """Resolve a source with the hub, and find out which of its files are in the store.

    Args:
        source: ``hf:...`` or ``https://...``.
        manifest: has the records of verified files.
        lock: the commit and hashes that the model must have.
        report_wait: that of hub.query_repo.

    Raises:
        StackctlError: the hub does not answer, has no such model, or differs from the lock.
    """
    parsed = require_remote(source)
    if parsed.url is not None:
        return _web_order(source, parsed, parsed.url, manifest)
    info = hub.query_repo(parsed.repo, parsed.revision or "main", report_wait=report_wait)
    choice = choose_model(info, parsed.quant)
    if lock is not None:
        lockfile.require_same(lock, info, choice.files)
    locked = {file.path: file.sha256 for file in lock.files} if lock else {}
    place = Repository(parsed.repo)
    place.prepare()
    base = hub.hub_endpoint()
    wanted = []
    for file in choice.files:
        wanted.append(
            DownloadRequest(
                name=file.path,
                url=hub.file_url(base, info, file),
                size=file.bytes,
                target=place.blob_path(file.name),
                lock=place.lock_path(file.name),
                sha256=locked.get(file.path, file.sha256),
                git_sha1=file.blob if file.sha256 is None else None,
            )
        )
    paths = tuple((file.path, file.name) for file in choice.files)
    revision: str | None = parsed.revision or "main"
    if revision == info.commit:
        revision = None
    return _order(source, place, info.commit, revision, wanted, paths, manifest, base)


def _order(
    source: str,
    place: Repository,
    commit: str | None,
    revision: str | None,
    request: Sequence[DownloadRequest],
    paths: tuple[tuple[str, str], ...],
    manifest: Manifest,
    base: str | None,
) -> DownloadPlan:
    known = {
        (file.path, file.bytes, file.mtime_ns): file.sha256
        for record in manifest.all()
        for file in record.files
    }
    present, unsure, todo = [], [], []
    unique = {file.target: file for file in request}  # equal files are one blob
    for file in unique.values():
        found = place.find_blob(file.target.name, file.size)
        if found is None:
            todo.append(file)
            continue
        key = (str(file.target.resolve()), found.st_size, found.st_mtime_ns)
        sha256 = known.get(key)
        if sha256 is not None and file.sha256 in (None, sha256):
            present.append(DownloadedFile(file, sha256, found.st_mtime_ns))
        else:
            unsure.append(file)
    return DownloadPlan(
        source=source,
        repo=place.repo,
        commit=commit,
        revision=revision,
        wanted=tuple(request),
        paths=paths,
        present=tuple(present),
        unsure=tuple(unsure),
        todo=tuple(todo),
        missing_bytes=sum(f.size - partial_file.bytes_on_disk(f.target, f.size) for f in todo),
        hub=base,
    )


def download_model(
    plan: DownloadPlan,
    manifest: Manifest,
    *,
    speed: DownloadSettings = DEFAULT_SETTINGS,
    progress: ProgressCallback = no_progress,
) -> StoredModel:
    """Download the missing files, verify them, and add the complete model to the store.

    Raises:
        StackctlError: a file cannot be fetched or verified; parts stay for the next run.
    """
    try:
        return _bring(plan, manifest, speed, progress)
    except OSError as error:
        raise partial_file.write_error(Path(error.filename or cache_folder()), error) from None


def _bring(
    plan: DownloadPlan, manifest: Manifest, speed: DownloadSettings, progress: ProgressCallback
) -> StoredModel:
    got = list(plan.present)
    todo = list(plan.todo)
    for file in plan.unsure:
        # Stored by another tool, or changed since. If its hash is wrong it is fetched again.
        found = _recheck(file, progress)
        if found is None:
            file.target.unlink(missing_ok=True)
            todo.append(file)
        else:
            got.append(found)
    _require_space(plan, todo)
    for one in download_files(
        todo,
        speed,
        secret=hub.hub_token(plan.hub) if todo and plan.hub is not None else None,
        tell=progress,
    ):
        # The other process that stored it may be another tool, which does not verify hashes.
        found = _recheck(one.request, progress) if one.sha256 is None else one
        if found is None:
            one.request.target.unlink(missing_ok=True)
            raise StackctlError(
                f"{one.request.name}, which another process has fetched, is damaged; it is removed",
                hint="the same command fetches it again",
            )
        got.append(found)
    return _keep(plan, got, manifest)


def _recheck(file: DownloadRequest, progress: ProgressCallback) -> DownloadedFile | None:
    with open_regular_file(file.target) as (fd, size):
        mtime_ns = os.fstat(fd).st_mtime_ns
    sha256 = digest(file.target, ProgressMeter(file.size, progress).add)
    if file.sha256 is not None:
        right = sha256 == file.sha256
    else:
        blob = hashlib.sha1(b"blob %d\0" % size)
        with file.target.open("rb") as stream:
            while raw := stream.read(1 << 20):
                blob.update(raw)
        right = file.git_sha1 in (None, blob.hexdigest())
    return DownloadedFile(file, sha256, mtime_ns) if right else None


def _require_space(plan: DownloadPlan, todo: Sequence[DownloadRequest]) -> None:
    folder = cache_folder()
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    need = sum(file.size - partial_file.allocated_bytes(file.target) for file in todo)
    if todo and need + _SPARE_BYTES > free:
        raise StackctlError(
            f"{plan.source} needs {format_bytes(need)} more, {format_bytes(max(0, free))} are "
            f"free in {folder}",
            hint="stackctl model list shows what is there, HF_HUB_CACHE names another folder",
            exit_code=ExitCode.REFUSED,
        )


def _keep(plan: DownloadPlan, got: Sequence[DownloadedFile], manifest: Manifest) -> StoredModel:
    place = Repository(plan.repo)
    hashes = {one.request.target.name: one.sha256 for one in got if one.sha256 is not None}
    times = {hashes[one.request.target.name]: one.mtime_ns for one in got}
    commit, paths = plan.commit, dict(plan.paths)
    if commit is None:
        # A web server's file has no commit: its hash takes the place of commit and blob name.
        (one,) = got
        (sha256,) = hashes.values()
        commit = sha256[:40]
        target = place.blob_path(sha256)
        if one.request.target != target:
            # An older stackctl was killed before it renamed the file.
            one.request.target.replace(target)
        paths, hashes = dict.fromkeys(paths, target.name), {target.name: sha256}
    folder = place.write_snapshot(commit, paths)
    blobs = {str(place.blob_path(blob)) for blob in paths.values()}
    # Files of other snapshots are kept by the links there.
    imported = any(
        record.imported
        and record.folder in (None, str(folder))
        and blobs & {file.path for file in record.files}
        for record in manifest.all()
    )
    if plan.revision is not None:
        place.set_ref(plan.revision, commit)
    record = StoredModel(
        source=plan.source,
        repo=plan.repo,
        commit=commit,
        folder=str(folder),
        files=tuple(
            file_record(path, place.blob_path(blob), hashes[blob], times[hashes[blob]])
            for path, blob in paths.items()
        ),
        verified=record_time(),
        imported=imported,
    )
    manifest.put(record)
    return record


def _web_order(source: str, parsed: HubSource, url: str, manifest: Manifest) -> DownloadPlan:
    """Resolve a file of any web server; a request for its first byte shows its size."""
    hub.require_online()
    parts_of = urlsplit(source)
    if parts_of.scheme == "http" and parts_of.hostname not in hub.LOOPBACK:
        raise StackctlError(
            f"{host_of(url)} must be fetched by https",
            hint="a file that comes by http can be changed on the way",
            exit_code=ExitCode.USAGE,
        )
    pinned = re.fullmatch(r"sha256=([0-9a-f]{64})", parts_of.fragment)
    if parts_of.fragment and not pinned:
        raise StackctlError(
            f"#{parts_of.fragment[:80]} is not a valid checksum",
            hint="#sha256=HEX, the SHA-256 of the file",
            exit_code=ExitCode.USAGE,
        )
    name = parsed.quant or ""
    with Transfer() as transfer:
        response = transfer.get(url, {"Range": "bytes=0-0"}, secret=None)
        total = re.fullmatch(r"bytes 0-0/(\d{1,18})", response.header("Content-Range") or "")
        size = int(total[1]) if total else response.length
        if response.status not in (200, 206):
            raise hub.status_error(name, response)
    if size is None:
        raise StackctlError(f"{name}: {host_of(url)} reports no size")
    place = Repository(parsed.repo)
    place.prepare()
    sha256 = pinned[1] if pinned else None
    record = next((one for one in manifest.all() if one.repo == place.repo), None)
    if record is not None and record.bytes == size and sha256 in (None, record.files[0].sha256):
        sha256 = record.files[0].sha256  # fetched before: the server may have another file now
    # Until its hash is known, the blob is named by the hash of its URL.
    blob = sha256 or f"web-{hashlib.sha256(url.encode()).hexdigest()[:32]}"
    request = DownloadRequest(
        name,
        url,
        size,
        place.blob_path(blob),
        place.lock_path(blob),
        sha256,
        named_by_hash=sha256 is None,
    )
    return _order(source, place, None, "main", [request], ((name, blob),), manifest, None)
