"""Download of models, by this process or by a service that survives a lost connection."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from stackctl.deploy import images, model_integrity, preflight
from stackctl.deploy.context import Context
from stackctl.deploy.new_generation import UpOptions, require_startable
from stackctl.deploy.planning import PlanBasis, inputs_before_image, read_basis
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner
from stackctl.machine.files import read_private, remove_file, write_atomically
from stackctl.plan.planner import make_plan_ignoring_user_claims
from stackctl.quantity import format_bytes
from stackctl.sources.catalogue import (
    HubDownload,
    find_download,
    read_entry,
    replacement_advice,
)
from stackctl.sources.hub_cache import cache_folder
from stackctl.sources.models import read_model
from stackctl.store import fetch
from stackctl.store.download_queue import DownloadSettings, RetryPolicy
from stackctl.store.download_rate import DownloadProgress
from stackctl.store.fetch import DownloadPlan
from stackctl.store.hub import HubRefusal
from stackctl.store.manifest import Manifest
from stackctl.store.remote_models import read_remote
from stackctl.values.base import from_json, to_json
from stackctl.values.model import Model
from stackctl.values.model_store import FetchJob, FetchState, ModelLock, StoredModel
from stackctl.values.profile import Profile
from stackctl.values.result import ErrorReport

#: A larger download needs the user's consent, and is run by a service.
LARGE_BYTES: Final = 10**9
_TELL_S: Final = 0.5
#: A service waits about an hour for a lost network to return.
_PATIENCE: Final = RetryPolicy(attempts=60)
_MOST_BYTES: Final = 16 << 20
#: Variables of the environment that a download needs; some hold secrets.
_ENVIRONMENT: Final = (
    "HOME", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "XDG_CACHE_HOME",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
_PATHS: Final = frozenset({"HF_HOME", "HF_TOKEN_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"})


@dataclass(frozen=True)
class ModelDownload:
    """A model to fetch, and how. With ``here`` this process fetches it, however large it is."""

    source: str
    lock: ModelLock | None = None
    speed: DownloadSettings = DownloadSettings()  # noqa: RUF009 - frozen
    here: bool = False


def fetch_model(context: Context, wanted: ModelDownload) -> StoredModel:
    """Download a model into the store and verify it. Ask first if more than 1 GB is missing.

    ``catalogue:ID`` is fetched from the place that the catalogue names.

    Raises:
        StackctlError: the download failed or was declined; downloaded parts are kept for the next
            attempt. Exit 2 if there is no terminal for the question.
    """
    if (known := find_download(wanted.source)) is not None:
        wanted = dataclasses.replace(wanted, source=known.source)
    service = _Service(context, wanted.source)
    if service.running():
        context.progress.step("model", f"{wanted.source} is being fetched ({service.unit})")
        return service.follow()
    service.forget()
    _require_remote(wanted.source)
    context.progress.progress("model", f"asking for {wanted.source}")
    plan = fetch.plan_download(
        wanted.source,
        model_integrity.model_manifest(context),
        wanted.lock,
        partial(context.progress.progress, "model"),
    )
    large = plan.missing_bytes > LARGE_BYTES
    if large and not context.confirm(_question(plan)):
        raise StackctlError("nothing was fetched")
    if large and not wanted.here and service.possible():
        service.start(wanted)
        return service.follow()
    record = fetch.download_model(
        plan,
        model_integrity.model_manifest(context),
        speed=wanted.speed,
        progress=model_integrity.progress_reporter(context),
    )
    _report_model(context, record, plan.missing_bytes)
    return record


def _require_remote(source: str) -> None:
    """Raise StackctlError (exit 2) for a source that cannot be fetched."""
    try:
        fetch.require_remote(source)
    except StackctlError as error:
        error.hint = replacement_advice(source) or error.hint
        raise


def ensure_model(context: Context, profile: Profile, options: UpOptions) -> None:
    """Fetch the model of a profile, if it is on a hub and not in the store.

    Called before the lock is taken, because a download takes long. A plan from the catalogue's
    facts, and one from the hub's metadata, refuse unsuitable models before the download.

    Raises:
        StackctlError: the download failed, or a file of the model has changed; exit 5 if the model
            does not fit or is not viable; exit 6 if Podman, a GPU or an image that has to be built
            is missing.
    """
    if profile.model is None or options.dry_run:
        return
    download = find_download(profile.model)
    source = profile.model if download is None else download.source
    if model_integrity.is_here(context, source):
        return
    # A machine that cannot run the stack downloads nothing.
    basis = read_basis(context.paths, context.machine)
    preflight.require_tools(basis.host)
    images.require_built(profile, find_engine(profile.engine))
    if download is not None:
        # The facts of the catalogue refuse without asking the hub. The cache may have a part of the
        # model, whose files cannot be read.
        facts = read_entry(profile.model.removeprefix("catalogue:"))
        _require_use(basis, profile, facts, options)
    try:
        model = remote_model_facts(context, source)
        if model is not None:
            _require_use(basis, profile, model, options)
        fetch_model(context, ModelDownload(source))
    except StackctlError as error:
        _add_advice(error, profile.model, download)
        raise


def _add_advice(error: StackctlError, source: str, download: HubDownload | None) -> None:
    """Add the catalogue's advice to the error of a hub that does not have the model."""
    advice = replacement_advice(source)
    if advice is None and download is not None:
        advice = f"another copy of this model: --model file:PATH or --model hf:ORG/REPO ({source})"
    lacks = isinstance(error, HubRefusal) or error.exit_code == ExitCode.NOT_FOUND
    if advice is not None and lacks:
        error.hint = f"{error.hint}\n{advice}" if error.hint else advice


def _require_use(basis: PlanBasis, profile: Profile, model: Model, options: UpOptions) -> None:
    """Raise StackctlError (exit 5 or 6) for a model that cannot be started here."""
    inputs = inputs_before_image(basis, profile, model)
    plan, _ = make_plan_ignoring_user_claims(
        host=basis.host, model=model, profile=profile, inputs=inputs, binding=basis.binding
    )
    require_startable(basis, profile, plan, options)


def remote_model_facts(context: Context, source: str) -> Model | None:
    """Return the facts of a model, from its files or its hub; None for a URL not downloaded yet."""
    with contextlib.suppress(StackctlError):
        return read_model(source)
    parsed = fetch.require_remote(source)
    if parsed.url is not None:
        return None
    context.progress.progress("model", f"asking for {source}")
    return read_remote(
        source, parsed, context.paths.cache, partial(context.progress.progress, "model")
    )


def _report_model(context: Context, record: StoredModel, came: int) -> None:
    count = len(record.files)
    words = f"{format_bytes(record.bytes)} in {count} file{'s' if count > 1 else ''}, verified"
    if came == 0:
        words += ", here already"
    context.progress.step("model", f"{record.source}, {words}")


def _question(plan: DownloadPlan) -> str:
    words = f"{plan.source}: {format_bytes(plan.missing_bytes)} are to be downloaded"
    if plan.missing_bytes < plan.bytes:
        words += f" ({format_bytes(plan.bytes - plan.missing_bytes)} are here)"
    return f"{words} to {cache_folder()}"


def _absolute(name: str) -> str:
    """Return a variable with its path made absolute: the service has another working folder."""
    value = os.environ[name]
    return str(Path(value).expanduser().absolute()) if value and name in _PATHS else value


class _Service:
    """The download of one source as a transient unit, and the two files that it shares.

    The job file describes the download; the unit reads and removes it. The state file holds the
    progress and the result.
    """

    def __init__(self, context: Context, source: str) -> None:
        digest = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:10]
        self._context = context
        self._source = source
        self.unit = f"stackctl-fetch-{digest}.service"
        self._job = context.paths.runtime / f"fetch-{digest}.job"
        self._state = context.paths.runtime / f"fetch-{digest}.json"

    def running(self) -> bool:
        """Return True if the download runs now."""
        if not self._state.exists() and not self._job.exists():
            return False
        try:
            found = self._context.systemd.show(self.unit, "ActiveState")
        except StackctlError:
            return False
        return found.get("ActiveState") in ("active", "activating", "reloading")

    def possible(self) -> bool:
        """Return True if there is a service manager; warn if there is none."""
        try:
            self._context.systemd.require()
        except StackctlError:
            self._context.progress.warn("without systemd the download ends with this command")
            return False
        return True

    def start(self, wanted: ModelDownload) -> None:
        """Start the download."""
        job = FetchJob(
            source=wanted.source,
            state=str(self._context.paths.state.absolute()),
            cache=str(cache_folder()),
            lock=wanted.lock,
            limit=wanted.speed.limit,
            connections=wanted.speed.connections,
            environment=tuple(
                (name, _absolute(name)) for name in _ENVIRONMENT if name in os.environ
            ),
        )
        write_atomically(self._job, to_json(job), mode=0o600)
        _write(self._state, FetchState(source=wanted.source))
        words = (*runner.own_command(), f"--{self._context.paths.scope}")
        try:
            self._context.systemd.run_transient(
                self.unit,
                # The query of a signed URL is a secret, and every user can read descriptions.
                f"stackctl fetches {self._source.partition('?')[0]}",
                (*words, "model", "fetch", "--job", str(self._job)),
            )
        except BaseException:
            self.forget()
            raise
        user = self._context.paths.scope == "user"
        linger = f"/var/lib/systemd/linger/{getpass.getuser()}"
        if user and self._context.machine.read(linger) is None:
            self._context.progress.warn(
                "the download ends when you log out", "loginctl enable-linger $USER"
            )
        flag = "--user " if user else ""
        self._context.progress.step(
            "model", f"fetching as {self.unit}; to end it: systemctl {flag}stop {self.unit}"
        )

    def forget(self) -> None:
        """Remove the files of an earlier download."""
        remove_file(self._job)
        remove_file(self._state)

    def follow(self) -> StoredModel:
        """Report the progress until the download has ended.

        Raises:
            StackctlError: the error of the download, or that it ended without a result.
        """
        tell = model_integrity.progress_reporter(self._context)
        try:
            while True:
                state = self._read()
                if state is not None and state.state != "running":
                    break
                if state is not None and (total := state.total_bytes):
                    tell(DownloadProgress(state.done_bytes, total, state.speed, state.note))
                if not self.running():
                    state = self._read()
                    break
                time.sleep(_TELL_S)
        except KeyboardInterrupt:
            self._context.progress.step(
                "model", f"it goes on by itself; stackctl model fetch {self._source} shows it"
            )
            raise
        self.forget()
        if state is not None and state.error is not None:
            raise StackctlError(
                state.error.message,
                hint=state.error.hint,
                details=state.error.details,
                exit_code=ExitCode(state.error.exit_code),
            )
        record = model_integrity.model_manifest(self._context).record_of_source(self._source)
        if state is None or state.state != "done" or record is None:
            raise StackctlError(
                f"the download of {self._source} was ended",
                hint="the part is kept: the same command continues it",
            )
        _report_model(self._context, record, state.total_bytes)
        return record

    def _read(self) -> FetchState | None:
        with contextlib.suppress(OSError, StackctlError):
            return from_json(self._state.read_bytes(), FetchState, where=str(self._state))
        return None


def run_download_job(path: Path) -> None:
    """Run a download as the service: read and remove the job file, then fetch.

    Raises:
        StackctlError: the download failed; the state file holds the error as well.
    """
    raw = read_private(path, _MOST_BYTES, secret=True)
    if raw is None:
        raise StackctlError(f"there is no {path}", exit_code=ExitCode.USAGE)
    job = from_json(raw, FetchJob, where=str(path))
    remove_file(path)
    os.environ.update({**dict(job.environment), "HF_HUB_CACHE": job.cache})
    path = path.with_suffix(".json")
    state = partial(FetchState, source=job.source)
    last = 0.0

    def tell(progress: DownloadProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_S:
            last = time.monotonic()
            now = state(
                done_bytes=progress.done,
                total_bytes=progress.total,
                speed=progress.speed,
                note=progress.note,
            )
            _write(path, now)

    try:
        manifest = Manifest(Path(job.state))
        plan = fetch.plan_download(
            job.source, manifest, job.lock, lambda note: _write(path, state(note=note))
        )
        speed = DownloadSettings(job.limit, job.connections, _PATIENCE)
        record = fetch.download_model(plan, manifest, speed=speed, progress=tell)
    except StackctlError as error:
        report = ErrorReport(
            message=error.message,
            hint=error.hint,
            details=error.details,
            exit_code=int(error.exit_code),
        )
        _write(path, state(state="failed", error=report))
        raise
    _write(path, state(state="done", done_bytes=record.bytes, total_bytes=record.bytes))


def _write(path: Path, state: FetchState) -> None:
    # On a full disk the state is lost; the download itself then fails with that reason.
    with contextlib.suppress(StackctlError):
        write_atomically(path, to_json(state), mode=0o600)
