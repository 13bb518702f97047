"""Models on disk: the documents ``stackctl.lock/1``, ``stackctl.stored/1`` and their lists."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.result import ErrorReport, Result


class LockedFile(Value, frozen=True, kw_only=True):
    """One file of a repository: its path there, its size, its SHA-256, and its name in a store
    (that, or its name as a git blob)."""

    path: str
    bytes: int
    sha256: str
    blob: str


class ModelLock(Value, frozen=True, kw_only=True):
    """What exactly a model is: for version control, so that others get the same bytes.

    ``source`` names the commit; ``repo`` and ``commit`` are those of the hub.
    """

    schema: Literal["stackctl.lock/1"] = "stackctl.lock/1"
    source: str
    repo: str
    commit: str
    files: tuple[LockedFile, ...]


class ExportedImage(Value, frozen=True, kw_only=True):
    """An image in a folder for another machine: its name, and the archive there."""

    name: str
    file: str
    bytes: int
    sha256: str


class Export(Value, frozen=True, kw_only=True):
    """What a folder for another machine holds: files by their SHA-256, and images."""

    schema: Literal["stackctl.export/1"] = "stackctl.export/1"
    models: tuple[ModelLock, ...] = ()
    images: tuple[ExportedImage, ...] = ()


class StoredFile(Value, frozen=True, kw_only=True):
    """One file on disk: what it is called, where its bytes lie, and what they were when hashed."""

    name: str
    path: str
    bytes: int
    sha256: str
    mtime_ns: int


class StoredModel(Value, frozen=True, kw_only=True):
    """A model that was fetched or imported, as it was then.

    ``source`` is how it is named. Of the hub: ``repo``, ``commit`` and the snapshot's ``folder``.
    ``verified`` is when all of it was hashed last, in UTC.
    """

    schema: Literal["stackctl.stored/1"] = "stackctl.stored/1"
    source: str
    repo: str | None = None
    commit: str | None = None
    folder: str | None = None
    files: tuple[StoredFile, ...]
    verified: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


class StoredModels(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model list``."""

    schema: Literal["stackctl.models/1"] = "stackctl.models/1"
    folder: str
    models: tuple[StoredModel, ...]


class ModelCheck(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model verify``, one a file."""

    schema: Literal["stackctl.modelcheck/1"] = "stackctl.modelcheck/1"
    source: str
    results: tuple[Result, ...]


class ModelChecks(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model verify`` for all models."""

    schema: Literal["stackctl.modelchecks/1"] = "stackctl.modelchecks/1"
    models: tuple[ModelCheck, ...]


class FetchJob(Value, frozen=True, kw_only=True):
    """What a download that runs by itself is told; ``environment`` holds what it needs of ours,
    also secrets: the file is its owner's alone, and gone once it was read. ``state`` is the folder
    of the records, ``cache`` the one for the models: it need not see them as we do."""

    schema: Literal["stackctl.fetchjob/1"] = "stackctl.fetchjob/1"
    source: str
    state: str
    cache: str
    lock: ModelLock | None = None
    limit: float | None = None
    connections: int
    environment: tuple[tuple[str, str], ...] = ()


class FetchState(Value, frozen=True, kw_only=True):
    """How far a download is; ``speed`` in bytes a second, ``note`` what it waits for."""

    schema: Literal["stackctl.fetch/1"] = "stackctl.fetch/1"
    source: str
    state: Literal["running", "done", "failed"] = "running"
    done_bytes: int = 0
    total_bytes: int = 0
    speed: float | None = None
    note: str | None = None
    error: ErrorReport | None = None


class ModelChoice(Value, frozen=True, kw_only=True):
    """One model of a repository: its size in bytes, and what it would do on this machine by the
    profile that suits it best (None: not known)."""

    source: str
    quantization: str | None = None
    format: Literal["gguf", "safetensors"]
    bytes: int
    profile: str | None = None
    fits: bool | None = None
    viable: bool | None = None
    decode_tok_s: tuple[float, float] | None = None
    recommended: bool = False


class Choices(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model show`` for a repository with several models."""

    schema: Literal["stackctl.choices/1"] = "stackctl.choices/1"
    repo: str
    commit: str
    choices: tuple[ModelChoice, ...]
