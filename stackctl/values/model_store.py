"""Models on disk: the documents ``stackctl.lock/1``, ``stackctl.stored/1`` and their lists."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.model import ModelFormat
from stackctl.values.result import ErrorReport, Result


class LockedFile(Value, frozen=True, kw_only=True):
    """One file of a repository: its path there, its size and its SHA-256.

    ``blob`` is its name in the hub's cache: the SHA-256, or the hash of a git blob.
    """

    path: str
    bytes: int
    sha256: str
    blob: str


class ModelLock(Value, frozen=True, kw_only=True):
    """The exact files of a model, for version control: others download the same bytes.

    ``source`` includes the commit; ``repo`` and ``commit`` are those of the hub.
    """

    schema: Literal["stackctl.lock/1"] = "stackctl.lock/1"
    source: str
    repo: str
    commit: str
    files: tuple[LockedFile, ...]


class ExportedImage(Value, frozen=True, kw_only=True):
    """An image in an export: its name, and its archive in the folder."""

    name: str
    file: str
    bytes: int
    sha256: str


class Export(Value, frozen=True, kw_only=True):
    """The contents of a folder for another machine: models, and images."""

    schema: Literal["stackctl.export/1"] = "stackctl.export/1"
    models: tuple[ModelLock, ...] = ()
    images: tuple[ExportedImage, ...] = ()


class StoredFile(Value, frozen=True, kw_only=True):
    """One file on disk: its name, its path, and its size, time and SHA-256 when it was hashed."""

    name: str
    path: str
    bytes: int
    sha256: str
    mtime_ns: int


class StoredModel(Value, frozen=True, kw_only=True):
    """The record of a model that was fetched or imported.

    ``source`` is the text that names the model. A model from the hub has ``repo``, ``commit`` and
    the ``folder`` of its snapshot. ``verified`` is the time of the last complete hashing, in UTC.
    ``imported`` is true if the files were imported in place: stackctl never removes them.
    """

    schema: Literal["stackctl.stored/1"] = "stackctl.stored/1"
    source: str
    repo: str | None = None
    commit: str | None = None
    folder: str | None = None
    files: tuple[StoredFile, ...]
    verified: str
    imported: bool = False

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.bytes for file in self.files)


class StoredModels(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model list``."""

    schema: Literal["stackctl.models/1"] = "stackctl.models/1"
    folder: str
    models: tuple[StoredModel, ...]


class ModelCheck(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model verify``, one per file."""

    schema: Literal["stackctl.modelcheck/1"] = "stackctl.modelcheck/1"
    source: str
    results: tuple[Result, ...]


class ModelChecks(Value, frozen=True, kw_only=True):
    """Results of ``stackctl model verify`` for all models."""

    schema: Literal["stackctl.modelchecks/1"] = "stackctl.modelchecks/1"
    models: tuple[ModelCheck, ...]


class FetchJob(Value, frozen=True, kw_only=True):
    """The input of a download that runs as a service of its own.

    ``environment`` holds variables of the caller, also secrets: only the owner may read the file,
    and the service deletes it after reading. ``state`` is the folder of the records, ``cache`` that
    of the models; both are passed because the service's environment may name other folders.
    """

    schema: Literal["stackctl.fetchjob/1"] = "stackctl.fetchjob/1"
    source: str
    state: str
    cache: str
    lock: ModelLock | None = None
    limit: float | None = None
    connections: int
    environment: tuple[tuple[str, str], ...] = ()


class FetchState(Value, frozen=True, kw_only=True):
    """The progress of a download; ``speed`` in bytes per second, ``note`` the cause of a wait."""

    schema: Literal["stackctl.fetch/1"] = "stackctl.fetch/1"
    source: str
    state: Literal["running", "done", "failed"] = "running"
    done_bytes: int = 0
    total_bytes: int = 0
    speed: float | None = None
    note: str | None = None
    error: ErrorReport | None = None


class ModelChoice(Value, frozen=True, kw_only=True):
    """One model of a repository: its size in bytes, and its expected speed on this machine.

    The speed is that with the most suitable profile; None: unknown.
    """

    source: str
    quantization: str | None = None
    format: ModelFormat
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
