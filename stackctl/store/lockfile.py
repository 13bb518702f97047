"""Lock files: the commit and the hashes of a model, for version control."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.hub_cache import parse_remote
from stackctl.sources.source_files import read_bytes
from stackctl.store.hub import RemoteFile, RepoInfo, require_plain_path
from stackctl.values.base import from_json
from stackctl.values.model_store import LockedFile, ModelLock, StoredModel

_MOST_BYTES: Final = 16 << 20
_MOST_SIZE: Final = 1 << 50


def lock_of(record: StoredModel) -> ModelLock:
    """Return the lock file of a stored model.

    Raises StackctlError (exit 2) for a model without a commit (``file:``, ``dir:``).
    """
    parsed = parse_remote(record.source)
    if parsed is None or record.repo is None or record.commit is None:
        raise StackctlError(
            f"{record.source} is not of a hub: there is no commit to lock",
            hint="stackctl model verify detects changes of its files",
            exit_code=ExitCode.USAGE,
        )
    rest = f":{parsed.quant}" if parsed.quant else ""
    return ModelLock(
        source=record.source if parsed.url else f"hf:{parsed.repo}@{record.commit}{rest}",
        repo=record.repo,
        commit=record.commit,
        files=tuple(
            LockedFile(
                path=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                blob=file.path.rpartition("/")[2],
            )
            for file in record.files
        ),
    )


def read_lock(path: Path) -> ModelLock:
    """Read a lock file as untrusted data. Raises StackctlError (exit 2) if it is not sound."""
    found = from_json(read_bytes(path, _MOST_BYTES), ModelLock, where=str(path))
    require_sound(found, str(path))
    return found


def require_sound(lock: ModelLock, where: str) -> None:
    """Raise StackctlError (exit 2) for a lock that contradicts itself or leads out of the store."""
    parsed = parse_remote(lock.source)
    named = parsed is not None and (
        parsed.repo == lock.repo and (parsed.url is not None or parsed.revision == lock.commit)
    )
    names = {file.path for file in lock.files}
    if not (named and re.fullmatch("[0-9a-f]{40}", lock.commit)) or not names:
        raise StackctlError(
            f"{where}: source, repo, commit and files do not match",
            hint="stackctl model lock writes lock files",
            exit_code=ExitCode.USAGE,
        )
    if len(names) != len(lock.files):
        raise StackctlError(f"{where}: it names a file twice", exit_code=ExitCode.USAGE)
    for file in lock.files:
        require_plain_path(file.path, where)
        if not (
            re.fullmatch("[0-9a-f]{64}", file.sha256)
            # Otherwise the blob could name the content of another file.
            and (file.blob == file.sha256 or re.fullmatch("[0-9a-f]{40}", file.blob))
            and 0 <= file.bytes < _MOST_SIZE
        ):
            raise StackctlError(
                f"{where}: invalid size, SHA-256 or blob of {file.path}", exit_code=ExitCode.USAGE
            )


def require_same(lock: ModelLock, info: RepoInfo, files: Sequence[RemoteFile]) -> None:
    """Raise StackctlError with the difference if the hub's commit or files differ from the lock."""
    locked = {file.path: file for file in lock.files}
    why = None
    if (lock.repo, lock.commit) != (info.repo, info.commit):
        why = f"it has commit {info.commit[:12]}, not {lock.commit[:12]}"
    elif locked.keys() != {file.path for file in files}:
        why = "it consists of other files"
    else:
        for file in files:
            wanted = locked[file.path]
            if file.bytes != wanted.bytes or file.sha256 not in (None, wanted.sha256):
                why = f"{file.path} is another file"
                break
    if why is not None:
        raise StackctlError(
            f"{info.repo} differs from the lock file: {why}",
            hint="the hub's copy was changed, or the lock file: look at both before you trust one",
        )
