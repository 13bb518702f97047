"""Import models that are on the disk already, find their records, and remove models."""

from __future__ import annotations

import os
from pathlib import Path

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.hub_cache import cache_folder, parse_remote
from stackctl.sources.models import read_model
from stackctl.store.download_rate import DownloadProgress, SpeedMeter
from stackctl.store.hub_repository import Repository
from stackctl.store.manifest import (
    Manifest,
    ProgressCallback,
    digest,
    file_record,
    no_progress,
    record_time,
)
from stackctl.values.model import Model
from stackctl.values.model_store import StoredModel


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
    paths = model_files(model)
    pace, before = SpeedMeter(sum(path.stat().st_size for path in paths.values())), 0
    files = []
    for name, path in paths.items():
        found = path.stat()

        def told(progress: DownloadProgress, before: int = before) -> None:
            tell(pace.progress_at(before + progress.done, before + progress.done))

        files.append(file_record(name, path, digest(path, found.st_size, told), found.st_mtime_ns))
        before += found.st_size
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


def model_files(model: Model) -> dict[str, Path]:
    """Return names and real paths of the files that an engine reads: weights and those beside."""
    if model.folder is None:
        return {file.file_name: Path(file.path) for file in model.files}
    folder = Path(model.folder)
    beside = {path.name: path.resolve() for path in sorted(folder.iterdir()) if path.is_file()}
    weights = {Path(file.path).name: Path(file.path) for file in model.files}
    known = set(beside.values())
    return beside | {name: path for name, path in weights.items() if path not in known}


def find_record(source: str, manifest: Manifest) -> StoredModel:
    """Return the record with this source, or the only one whose source contains it.

    Raises:
        StackctlError: no record matches (exit 4), or several do (exit 2).
    """
    records = manifest.all()
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
