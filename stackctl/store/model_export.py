"""Export models and images to a folder, and import them on machines without a network.

    stackctl-export.json     the list of models and images
    files/SHA256             the models' files, each once
    images/SHA256.tar        images, as podman saves them

The folder has plain names and no links, so that every file system can hold it. All files are
verified when they are imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import lock, podman
from stackctl.machine.files import sync_folder, write_atomically
from stackctl.sources.source_files import open_regular_file, read_bytes
from stackctl.store.download_rate import ProgressCallback, ProgressMeter, no_progress
from stackctl.store.hub_repository import Repository
from stackctl.store.lockfile import lock_of, require_sound
from stackctl.store.manifest import Manifest, digest, file_record, record_time
from stackctl.store.partial_file import require_single_link, write_error
from stackctl.values.base import from_json, to_json
from stackctl.values.model_store import Export, ExportedImage, ModelLock, StoredModel

NAME: Final = "stackctl-export.json"
_BLOCK: Final = 1 << 20
_MOST_BYTES: Final = 64 << 20


def export_models(
    records: Sequence[StoredModel],
    images: Sequence[str],
    folder: Path,
    progress: ProgressCallback = no_progress,
) -> Export:
    """Write models and images to a folder. Its earlier content stays and is not written again.

    Raises:
        StackctlError: a file has changed since it was hashed, or the folder cannot be written.
    """
    before = _read(folder) if (folder / NAME).exists() else Export()
    locks = {one.source: one for one in (*before.models, *map(lock_of, records))}
    saved = {image.name: image for image in before.images}
    meter = ProgressMeter(sum(record.bytes for record in records), progress)
    try:
        for name in ("files", "images"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
    for record in records:
        for file in record.files:
            target = folder / "files" / file.sha256
            _copy(Path(file.path), target, file.sha256, file.bytes, meter)
    for name in images:
        saved[name] = _save(name, folder / "images")
    document = Export(models=tuple(locks.values()), images=tuple(saved.values()))
    write_atomically(folder / NAME, to_json(document))
    return document


def is_export(folder: Path) -> bool:
    """Return True if ``export_models`` has written the folder."""
    return (folder / NAME).is_file()


def import_export(
    folder: Path, manifest: Manifest, progress: ProgressCallback = no_progress
) -> tuple[list[StoredModel], list[str]]:
    """Import the models of an export into the store, and its images into Podman.

    Returns:
        The records of the models, and the names of the images.

    Raises:
        StackctlError: a file is missing or damaged. Its model gets no snapshot and no record.
    """
    document = _read(folder)
    records = [_model(one, folder, manifest, progress) for one in document.models]
    for image in document.images:
        archive = folder / "images" / image.file
        if digest(archive, ProgressMeter(image.bytes, progress).add) != image.sha256:
            raise StackctlError(f"{archive} is damaged", hint="export it again")
        podman.load_archive(archive, image.name)
    return records, [image.name for image in document.images]


def _model(
    model: ModelLock, folder: Path, manifest: Manifest, progress: ProgressCallback
) -> StoredModel:
    place = Repository(model.repo)
    place.prepare()
    meter = ProgressMeter(sum(file.bytes for file in model.files), progress)
    times = {}
    for file in model.files:
        source, target = folder / "files" / file.sha256, place.blob_path(file.blob)
        place.find_blob(file.blob, file.bytes)
        times[file.blob] = _copy(source, target, file.sha256, file.bytes, meter)
    names = {file.path: file.blob for file in model.files}
    where = place.write_snapshot(model.commit, names)
    # "main" stands for this commit, too, unless it stands for another one.
    if "main" not in place.revisions():
        place.set_ref("main", model.commit)
    record = StoredModel(
        source=model.source,
        repo=model.repo,
        commit=model.commit,
        folder=str(where),
        files=tuple(
            file_record(f.path, place.blob_path(f.blob), f.sha256, times[f.blob])
            for f in model.files
        ),
        verified=record_time(),
    )
    manifest.put(record)
    return record


def _copy(source: Path, target: Path, sha256: str, size: int, meter: ProgressMeter) -> int:
    """Copy a file and check its hash; a correct file at the target is not written again.

    Returns:
        The target's time of change in nanoseconds.
    """
    there = target.is_file() and not target.is_symlink() and target.stat().st_size == size
    mtime_ns = target.stat().st_mtime_ns if there else 0
    if there and digest(target) == sha256:
        meter.add(size)
        return mtime_ns
    draft = target.with_name(f".{target.name}.part")
    sha, blob, done = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size), 0
    view = memoryview(bytearray(_BLOCK))
    try:
        with open_regular_file(source) as (fd, _):
            out = _draft(draft)
            try:
                while count := os.preadv(fd, [view], done):
                    sha.update(view[:count])
                    if len(target.name) == 40:  # the target's name is a git blob's
                        blob.update(view[:count])
                    left = view[:count]
                    while left:
                        left = left[os.write(out, left) :]
                    done += count
                    meter.add(count)
                os.fsync(out)
                if sha.hexdigest() != sha256 or target.name not in (sha256, blob.hexdigest()):
                    raise StackctlError(
                        f"{source} is damaged: its SHA-256 is not {sha256[:16]}...",
                        hint="stackctl model verify on the machine that it came from, and export "
                        "again",
                    )
                mtime_ns = os.fstat(out).st_mtime_ns
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)
                os.close(out)
        sync_folder(target.parent)
    except OSError as error:
        raise write_error(target, error) from None
    return mtime_ns


def _draft(path: Path) -> int:
    """Open and lock an empty draft; a killed process may have left one.

    Raises:
        StackctlError: another process writes it (exit 7), or it has a second hard link.
    """
    descriptor = lock.try_lock(path)
    if descriptor is not None and not lock.is_current(descriptor, path):
        os.close(descriptor)  # the other process has just renamed it
        descriptor = None
    if descriptor is None:
        raise StackctlError(
            f"another stackctl writes {path}", hint="try again", exit_code=ExitCode.LOCKED
        )
    require_single_link(descriptor, path)
    os.ftruncate(descriptor, 0)
    return descriptor


def _save(name: str, folder: Path) -> ExportedImage:
    draft = folder / f".saving.{os.getpid()}.tar"
    try:
        podman.save_archive(name, draft)
        found = digest(draft)
        target = folder / f"{found}.tar"
        draft.replace(target)
    except OSError as error:
        raise write_error(folder, error) from None
    finally:
        draft.unlink(missing_ok=True)
    return ExportedImage(name=name, file=target.name, bytes=target.stat().st_size, sha256=found)


def _read(folder: Path) -> Export:
    where = folder / NAME
    found = from_json(read_bytes(where, _MOST_BYTES), Export, where=str(where))
    for model in found.models:
        require_sound(model, str(where))
    for image in found.images:
        if not re.fullmatch(r"[0-9a-f]{64}\.tar", image.file) or not re.fullmatch(
            r"[A-Za-z0-9][\w./:@-]{0,250}", image.name
        ):
            raise StackctlError(
                f"{where}: {image.name[:60]!r} is not a valid image entry", exit_code=ExitCode.USAGE
            )
    return found
