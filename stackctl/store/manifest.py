"""Records of the files of models (``STATE/models/ID.json``): checks, imports and removals.

A file with unchanged size and time of change counts as unchanged. If only the time differs, the
file is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import remove_file, write_atomically
from stackctl.machine.path_security import make_private_folder
from stackctl.sources.hub_cache import cache_folder, parse_remote, snapshot_folder
from stackctl.sources.models import read_model
from stackctl.sources.source_files import open_regular_file
from stackctl.store.download_rate import ProgressCallback, ProgressMeter, no_progress
from stackctl.store.hub_repository import Repository
from stackctl.values.base import from_json, to_json
from stackctl.values.model import Model
from stackctl.values.model_store import StoredFile, StoredModel
from stackctl.values.result import Result

_BLOCK: Final = 8 << 20
_MOST_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """The records of one scope. ``state`` is the state folder."""

    state: Path

    def all(self) -> tuple[StoredModel, ...]:
        """Return all records, sorted by source; leave out those that cannot be read."""
        found = []
        folder = self.state / "models"
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            with contextlib.suppress(StackctlError, OSError):
                if path.stat().st_size <= _MOST_BYTES:
                    found.append(from_json(path.read_bytes(), StoredModel, where=str(path)))
        return tuple(sorted(found, key=lambda model: model.source))

    def put(self, model: StoredModel) -> None:
        """Store a record; it replaces those of the same source or the same files."""
        make_private_folder(self.state)
        write_atomically(self._path(model.source), to_json(model), mode=0o600)
        files = {(file.name, file.path) for file in model.files}
        for other in self.all():
            same = {(file.name, file.path) for file in other.files} == files
            if same and other.source != model.source:
                self.remove(other.source)

    def refresh(self, model: StoredModel) -> None:
        """Store the current times of a model whose files were all hashed just now and are right."""
        files = [
            msgspec.structs.replace(file, mtime_ns=_stat(file).st_mtime_ns) for file in model.files
        ]
        self.put(msgspec.structs.replace(model, files=tuple(files), verified=record_time()))

    def remove(self, source: str) -> None:
        """Remove a record, if there is one."""
        remove_file(self._path(source))

    def _path(self, source: str) -> Path:
        digest = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:20]
        return self.state / "models" / f"{digest}.json"

    def record_for(self, model: Model) -> StoredModel | None:
        """Return the record that contains all files of a model, or None."""
        paths = {file.path for file in model.files}
        for record in self.all():
            if paths and paths <= {file.path for file in record.files}:
                return record
        return None

    def check_model(
        self, model: Model, progress: ProgressCallback = no_progress
    ) -> StoredModel | None:
        """Check that a model's files are unchanged; return its record, None without one.

        Raises:
            StackctlError: a file has changed or cannot be read; the message names it.
        """
        record = self.record_for(model)
        return None if record is None else self.check_record(record, progress)

    def record_of_source(self, source: str) -> StoredModel | None:
        """Return the record of a hub source for the commit that the store has now, or None."""
        parsed = parse_remote(source)
        folder = snapshot_folder(parsed) if parsed is not None else None
        if parsed is None or folder is None:
            return None
        here = [record for record in self.all() if record.folder == str(folder)]
        for record in here:
            other = parse_remote(record.source)
            if record.source == source or (other is not None and other.quant == parsed.quant):
                return record
        return None

    def find(self, source: str) -> StoredModel:
        """Return the record with this source, or the only one whose source contains it.

        Raises:
            StackctlError: no record matches (exit 4), or several do (exit 2).
        """
        records = self.all()
        exact = [record for record in records if record.source == source]
        found = exact or [record for record in records if source.lower() in record.source.lower()]
        if len(found) == 1:
            return found[0]
        names = "\n".join(record.source for record in (found or records)[:8])
        if found:
            raise StackctlError(
                f"{source} matches {len(found)} models", hint=names, exit_code=ExitCode.USAGE
            )
        raise StackctlError(
            f"{source} was neither fetched nor imported",
            hint=names or f"stackctl model fetch {source}, or: stackctl model import {source}",
            exit_code=ExitCode.NOT_FOUND,
        )

    def check_record(
        self, record: StoredModel, progress: ProgressCallback = no_progress
    ) -> StoredModel:
        """Check that the files of a record are unchanged; like ``check_model``.

        If only times have changed, the new times are stored.
        """
        files, changed = [], False
        for file in record.files:
            found = _stat(file)
            if found.st_mtime_ns != file.mtime_ns:
                if digest(Path(file.path), ProgressMeter(file.bytes, progress).add) != file.sha256:
                    again = "fetch" if record.repo else "import"
                    raise StackctlError(
                        f"{file.path} ({file.name}) has changed: its content differs from the "
                        "fetched file",
                        hint=f"stackctl model {again} {record.source}",
                    )
                file = msgspec.structs.replace(file, mtime_ns=found.st_mtime_ns)
                changed = True
            files.append(file)
        if changed:
            record = msgspec.structs.replace(record, files=tuple(files))
            self.put(record)
        return record


def _stat(
    file: StoredFile, hint: str = "stackctl model verify shows all damaged files"
) -> os.stat_result:
    """Return a file's status; ``hint`` is the remedy if it cannot be read. Raises StackctlError."""
    try:
        found = Path(file.path).stat()
    except OSError as error:
        raise StackctlError(
            f"{file.path} ({file.name}) cannot be read: {error.strerror}",
            hint=hint,
        ) from None
    if found.st_size != file.bytes:
        raise StackctlError(
            f"{file.path} ({file.name}) has changed: it has {found.st_size} bytes, "
            f"not {file.bytes}",
            hint="fetch it again, or take it as it is now: stackctl model import",
        )
    return found


def verify_files(record: StoredModel, tell: ProgressCallback = no_progress) -> tuple[Result, ...]:
    """Hash all files of a model as they are on the disk; return the results, failures first."""
    results = []
    meter, before = ProgressMeter(record.bytes, tell), 0
    for file in record.files:
        results.append(_verify(file, _restoring(record), meter))
        before += file.bytes
        meter.done = before  # also if the file could not be read
    return tuple(sorted(results, key=lambda result: result.status != "fail"))


def _restoring(record: StoredModel) -> str:
    """Return the remedy for a missing file: models of the hub can be fetched again."""
    if record.repo is not None:
        return f"stackctl model fetch {record.source}"
    return f"restore the file, or forget the model: stackctl model remove {record.source}"


def _verify(file: StoredFile, restoring: str, meter: ProgressMeter) -> Result:
    try:
        _stat(file, restoring)
        found = digest(Path(file.path), meter.add, past_cache=True)
    except StackctlError as error:
        return Result(name=file.name, status="fail", actual=error.message, remedy=error.hint)
    right = found == file.sha256
    return Result(
        name=file.name,
        status="ok" if right else "fail",
        expected=f"sha256 {file.sha256}",
        actual="as it was" if right else f"sha256 {found}",
        evidence=None if right else file.path,
    )


def record_time() -> str:
    """Return the time in UTC in the format of records."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def digest(
    path: Path, advance: Callable[[int], None] = lambda _: None, *, past_cache: bool = False
) -> str:
    """Return the SHA-256 of a file in hex; ``past_cache`` reads the disk, not the page cache.

    ``advance`` is called with the number of bytes of each read.

    Raises:
        StackctlError: the file cannot be read.
    """
    sha, done = hashlib.sha256(), 0
    buffer = mmap.mmap(-1, _BLOCK)  # direct reads need aligned memory
    with open_regular_file(path) as (fd, _), contextlib.closing(buffer), memoryview(buffer) as view:
        if past_cache:
            # Dirty pages cannot be dropped, but a stored file has been synced.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        direct = _direct(path) if past_cache else None
        source = fd if direct is None else direct
        try:
            while True:
                try:
                    count = os.preadv(source, [view], done)
                except OSError:
                    if source == fd:
                        raise
                    source = fd  # the file system refuses direct reads, or this last one
                    continue
                if count == 0:
                    break
                sha.update(view[:count])
                done += count
                advance(count)
        finally:
            if direct is not None:
                os.close(direct)
    return sha.hexdigest()


def _direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def file_record(name: str, path: Path, sha256: str, mtime_ns: int) -> StoredFile:
    """Return the record of a hashed file; ``mtime_ns`` is its time of change before hashing.

    Raises:
        StackctlError: the file is gone, or was changed while it was hashed.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise StackctlError(f"cannot read {path}: {error.strerror}") from None
    if found.st_mtime_ns != mtime_ns:
        raise StackctlError(f"{path} was changed while it was hashed", hint="try again")
    return StoredFile(
        name=name,
        path=str(path.resolve()),
        bytes=found.st_size,
        sha256=sha256,
        mtime_ns=found.st_mtime_ns,
    )


def import_in_place(
    source: str, manifest: Manifest, tell: ProgressCallback = no_progress
) -> StoredModel:
    """Hash a model's files where they are, so that a later change is detected. Nothing is copied.

    Args:
        source: ``file:PATH``, ``dir:PATH``, or ``hf:...`` if another tool has fetched it.
        manifest: gets the record.
        tell: called with the progress.

    Raises:
        StackctlError: the source is not a model, or not on this machine (exit 4).
    """
    model = read_model(source)
    if not model.files:
        raise StackctlError(f"{source} is not on this machine", exit_code=ExitCode.NOT_FOUND)
    paths = _files_to_read(model)
    meter = ProgressMeter(sum(path.stat().st_size for path in paths.values()), tell)
    files = []
    for name, path in paths.items():
        mtime_ns = path.stat().st_mtime_ns
        files.append(file_record(name, path, digest(path, meter.add), mtime_ns))
    parsed = parse_remote(source)
    record = StoredModel(
        source=model.source,
        repo=parsed.repo if parsed else None,
        commit=Path(model.folder).name if parsed and model.folder else None,
        folder=model.folder,
        files=tuple(files),
        verified=record_time(),
        imported=True,
    )
    manifest.put(record)
    return record


def _files_to_read(model: Model) -> dict[str, Path]:
    """Return names and real paths of the files that an engine reads: weights and those beside."""
    if model.folder is None:
        return {file.file_name: Path(file.path) for file in model.files}
    folder = Path(model.folder)
    beside = {path.name: path.resolve() for path in sorted(folder.iterdir()) if path.is_file()}
    weights = {Path(file.path).name: Path(file.path) for file in model.files}
    known = set(beside.values())
    return beside | {name: path for name, path in weights.items() if path not in known}


def remove_model(record: StoredModel, manifest: Manifest) -> int:
    """Remove a model's record and, if stackctl has fetched it, its files in the hub's cache.

    Files that another model uses stay, and so do the files of a model that was imported in place.

    Returns:
        The bytes that were freed.

    Raises:
        StackctlError: the model is in another cache, or a file cannot be removed.
    """
    freed = 0
    if record.repo is not None and record.commit is not None and not record.imported:
        place = Repository(record.repo)
        folder = str(place.snapshot_path(record.commit))
        if record.folder not in (None, folder) and os.path.isdir(record.folder):  # noqa: PTH112
            raise StackctlError(
                f"{record.source} lies in {record.folder}, which is not below {cache_folder()}",
                hint="HF_HUB_CACHE names the cache that it was fetched to",
            )
        # A file that another model of the same commit uses is kept.
        others = {
            file.name
            for other in manifest.all()
            if other.source != record.source and other.folder == record.folder
            for file in other.files
        }
        mine = {file.name: Path(file.path).name for file in record.files if file.name not in others}
        freed = place.remove(record.commit, mine)
    manifest.remove(record.source)
    return freed
