"""Checks of models before a deployment: their files are here, and unchanged since hashed."""

from __future__ import annotations

import time
from pathlib import Path

from stackctl.deploy import preflight, stack_state, unit_files
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import format_bytes
from stackctl.sources.hub_cache import parse_remote
from stackctl.sources.models import read_model
from stackctl.store.download_rate import DownloadProgress, ProgressCallback
from stackctl.store.manifest import Manifest
from stackctl.values.model import Model
from stackctl.values.model_store import StoredModel


def model_manifest(context: Context) -> Manifest:
    """Return the records of models in this scope."""
    return Manifest(context.paths.state)


def progress_reporter(context: Context, what: str = "") -> ProgressCallback:
    """Return a function that reports the progress of a download or of hashing, after ``what``."""
    start: list[float] = []

    def tell(progress: DownloadProgress) -> None:
        start.append(time.monotonic()) if not start else None
        context.progress.progress(
            "model", what + progress.text(), elapsed_s=time.monotonic() - start[0]
        )

    return tell


def require_verified(context: Context, model: Model) -> None:
    """Check that a model's files are on this machine and unchanged, and report the model.

    Raises:
        StackctlError: exit 1 if only facts of the model are known, or with the name of a file that
            has changed since it was fetched or imported.
    """
    preflight.require_files(model)
    known = require_unchanged(context, model)
    words = "verified" if known else "not verified (stackctl model import)"
    context.progress.step("model", f"{format_bytes(model.weights_bytes)}, {words}, {model.source}")


def require_unchanged(context: Context, model: Model) -> bool:
    """Check that a model's files are unchanged; return False if there is no record of them."""
    return (
        model_manifest(context).check_model(model, progress_reporter(context, "hashing "))
        is not None
    )


def is_here(context: Context, source: str) -> bool:
    """Return True if all files of a model are in the store, or its source needs no download.

    Raises:
        StackctlError: with the name of a file that has changed since it was fetched.
    """
    if parse_remote(source) is None:
        return True
    record = model_manifest(context).record_of_source(source)
    if record is not None:
        if not all(Path(file.path).exists() for file in record.files):
            return False
        model_manifest(context).check_record(record, progress_reporter(context, "hashing "))
    try:
        return bool(read_model(source).files)
    except StackctlError:
        return False


def require_unused(context: Context, record: StoredModel) -> None:
    """Raise StackctlError (exit 5) for a model that an installed stack runs."""
    mine = {file.path for file in record.files}
    for stack in unit_files.installed_stacks(context):
        current = stack_state.inspect_stack(context, stack).generation
        if current is not None and mine & {file.path for file in current.plan.model.files}:
            raise StackctlError(
                f"{record.source} is used by {stack}",
                hint=f"stackctl down {stack}",
                exit_code=ExitCode.REFUSED,
            )
