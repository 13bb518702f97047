"""``stackctl model``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackctl.cli.options import FILE, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.values.model_store import StoredModel


@click.group("model")
def command() -> None:
    """Show, fetch, check and remove models.

    \b
    SOURCE is one of
      hf:ORG/REPO[@REV][:QUANT]  a model of a hub; QUANT may be a file
      https://.../NAME.gguf      one file of any server
      file:PATH                  a GGUF file; of several parts, any one
      dir:PATH                   a folder with config.json and safetensors
      catalogue:ID               a model of the catalogue, to show or fetch
    """


def _rate(_: Any, __: Any, value: str | None) -> int | None:
    from stackctl.quantity import parse_bytes

    if value is None:
        return None
    if (rate := parse_bytes(value.removesuffix("/s"))) < 1:
        raise StackctlError(
            f"--limit {value}: must be at least 1 byte per second",
            hint="--limit 50MB",
            exit_code=ExitCode.USAGE,
        )
    return rate


@stackctl_command("show")
@click.argument("source")
@click.option(
    "--hub", "ask", is_flag=True, help="Ask the hub, even if the model is on this machine."
)
def show(session: Session, source: str, ask: bool) -> None:
    """Show the facts of a model, downloaded or not.

    For a repository with several models, show which of them fit this machine, and their predicted
    speed.

    \b
    SOURCE is one of
      file:PATH                  a GGUF file; of several parts, any one
      dir:PATH                   a folder with config.json and safetensors
      hf:ORG/REPO[@REV][:QUANT]  the local hub cache, else catalogue or hub
      catalogue:ID               a model of `stackctl model catalogue`
      facts:FILE                 output of `stackctl model show --json`
    """
    from stackctl.machine.http_download import ConnectionLost
    from stackctl.sources.hub_cache import ModelNotCached, parse_remote
    from stackctl.sources.model_text import model_rows
    from stackctl.sources.models import read_model
    from stackctl.store import hub

    problem: StackctlError | None = None
    if not ask:
        try:
            model = read_model(source)
        except ModelNotCached as error:
            problem = error
        else:
            if not session.out.wrote_json(model):
                session.out.properties([*model_rows(model), *_origin_rows(source)])
            return
    parsed = parse_remote(source)
    if parsed is None or parsed.url is not None or (problem is not None and hub.offline_variable()):
        raise problem or StackctlError(
            f"{source} is not a repository of a hub", hint="hf:ORG/REPO", exit_code=ExitCode.USAGE
        )
    from stackctl.cli.model_quants import show_remote

    try:
        show_remote(session, source, parsed)
    except ConnectionLost as error:
        if problem is None:
            raise
        problem.details = (f"and the hub was asked: {error.message}",)
        raise problem from None


def _origin_rows(source: str) -> list[tuple[str, str]]:
    """Return rows on the place from which an entry of the catalogue is fetched."""
    from stackctl.sources.catalogue import find_download, replacement_advice

    if (download := find_download(source)) is not None:
        consent = ", after its owner's consent" if download.gated else ""
        rows = [("fetched from", f"hf:{download.repo}{consent}")]
        if download.file is not None:
            rows.append(("", download.file.rpartition("/")[2]))
        return rows
    advice = replacement_advice(source)
    return [] if advice is None else [("to fetch", advice)]


@stackctl_command("catalogue")
def catalogue(session: Session) -> None:
    """List the models whose facts ship with stackctl."""
    import json

    from stackctl.quantity import format_bytes
    from stackctl.sources.catalogue import catalogue_entries, read_entry
    from stackctl.sources.model_text import format_parameters

    models = [(name, read_entry(name)) for name in sorted(catalogue_entries())]
    if session.out.json:
        document = {"schema": "stackctl.catalogue/1", "models": [name for name, _ in models]}
        session.out.line(json.dumps(document, indent=2))
        return
    rows = [
        (
            name,
            format_parameters(model.parameters),
            model.quantization or "",
            format_bytes(model.weights_bytes),
        )
        for name, model in models
    ]
    session.out.table(("CATALOGUE", "SIZE", "QUANTISATION", "WEIGHTS"), rows, fold=0)


@stackctl_command("fetch")
@click.argument("source", required=False)
@click.option(
    "--lock",
    "lock_file",
    type=FILE,
    help="Fetch exactly the files of this lock file (stackctl model lock).",
)
@click.option("--limit", metavar="SIZE", callback=_rate, help="Bytes a second, such as 50MB.")
@click.option(
    "--connections",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    help="Number of pieces to fetch at the same time.",
)
@click.option("--here", is_flag=True, help="Download in this process, not in a service.")
@click.option(
    "--job", type=click.Path(path_type=Path), hidden=True, help="File with the job of the service."
)
@yes_option
def fetch(
    session: Session,
    source: str | None,
    lock_file: Path | None,
    limit: int | None,
    connections: int,
    here: bool,
    job: Path | None,
) -> None:
    """Download a model into the hub cache and verify it.

    SOURCE is hf:, https: or catalogue:ID. An interrupted download is resumed.

    For more than 1 GB the command asks first, and a service downloads the model. The service
    continues when this command or its connection ends. Run the command again to see the progress.
    """
    from stackctl.deploy.model_download import ModelDownload, fetch_model, run_download_job
    from stackctl.store.download_queue import DownloadSettings
    from stackctl.store.lockfile import read_lock

    if job is not None:
        run_download_job(job)
        return
    context = session.context(recover="no")
    lock = read_lock(lock_file) if lock_file is not None else None
    if lock is not None and source not in (None, lock.source):
        raise StackctlError(
            f"{lock_file} is about {lock.source}, not {source}", exit_code=ExitCode.USAGE
        )
    source = lock.source if lock is not None else source
    if source is None:
        raise StackctlError(
            "missing SOURCE", hint="SOURCE, or --lock FILE", exit_code=ExitCode.USAGE
        )
    record = fetch_model(
        context, ModelDownload(source, lock, DownloadSettings(limit, connections), here)
    )
    _result(session, record)


def _result(session: Session, record: StoredModel) -> None:
    if session.out.wrote_json(record):
        return
    session.out.line(record.folder or record.files[0].path)


@stackctl_command("list")
def list_models(session: Session) -> None:
    """List the models that were fetched or imported."""
    from stackctl.deploy import model_integrity
    from stackctl.quantity import format_bytes
    from stackctl.sources.hub_cache import cache_folder
    from stackctl.values.model_store import StoredModels

    records = model_integrity.model_manifest(session.context(recover="no")).all()
    if session.out.wrote_json(StoredModels(folder=str(cache_folder()), models=records)):
        return
    if not records:
        session.out.note("no model was fetched or imported: stackctl model fetch SOURCE")
        return
    rows = [
        (record.source, format_bytes(record.bytes), str(len(record.files)), record.verified[:10])
        for record in records
    ]
    session.out.table(("MODEL", "SIZE", "FILES", "VERIFIED"), rows, fold=0)


@stackctl_command("verify")
@click.argument("source", required=False)
def verify(session: Session, source: str | None) -> None:
    """Hash all files of a model again, or of all models.

    The files are read from the disk, not from the page cache.
    """
    from stackctl.deploy import model_integrity
    from stackctl.store import manifest as manifests
    from stackctl.values.model_store import ModelCheck, ModelChecks

    context = session.context(recover="no")
    manifest = model_integrity.model_manifest(context)
    records = manifest.all() if source is None else (manifest.find(source),)
    if not records:
        raise StackctlError(
            "no model was fetched or imported", hint="stackctl model fetch SOURCE",
            exit_code=ExitCode.NOT_FOUND,
        )  # fmt: skip
    checks = []
    for record in records:
        results = manifests.verify_files(
            record, model_integrity.progress_reporter(context, "hashing ")
        )
        checks.append(ModelCheck(source=record.source, results=results))
        if all(result.status == "ok" for result in results):
            manifest.refresh(record)
        if not session.out.json:
            session.out.line(record.source)
            session.out.results(results)
    if session.out.json:
        session.out.data(checks[0] if source is not None else ModelChecks(models=tuple(checks)))
    if any(result.status == "fail" for check in checks for result in check.results):
        raise click.exceptions.Exit(int(ExitCode.FAILED))


@stackctl_command("remove")
@click.argument("source")
@yes_option
def remove(session: Session, source: str) -> None:
    """Remove a model from the hub cache.

    The files of an imported model stay. A model that a stack uses is not removed.
    """
    from stackctl.deploy import model_integrity
    from stackctl.quantity import format_bytes
    from stackctl.store.manifest import remove_model

    context = session.context(recover="try")
    manifest = model_integrity.model_manifest(context)
    record = manifest.find(source)
    model_integrity.require_unused(context, record)
    what = f"remove {record.source}, {format_bytes(record.bytes)}"
    stays = record.imported or record.repo is None
    if stays:
        what = f"forget {record.source} (its files stay)"
    if not session.confirm(what):
        raise StackctlError("nothing was removed")
    freed = remove_model(record, manifest)
    if stays:
        session.out.line(f"{record.source} is forgotten, its files stay")
    else:
        session.out.line(f"{record.source} is removed, {format_bytes(freed)} are free again")


@stackctl_command("import")
@click.argument("source")
@yes_option
def import_model(session: Session, source: str) -> None:
    """Register a model where it lies, or import an exported folder.

    The files are hashed, so that a later change is noticed. They are not copied.

    If SOURCE is a folder that `stackctl model export` has written, its models are copied into the
    hub cache, and its images are loaded into Podman.
    """
    from stackctl.deploy import model_integrity
    from stackctl.store import manifest as manifests
    from stackctl.store import model_export
    from stackctl.values.model_store import StoredModels

    context = session.context(recover="no")
    manifest = model_integrity.model_manifest(context)
    tell = model_integrity.progress_reporter(context, "hashing ")
    folder = Path(source.removeprefix("dir:")).expanduser()
    if model_export.is_export(folder):
        from stackctl.sources.hub_cache import cache_folder

        records, images = model_export.import_export(
            folder, manifest, model_integrity.progress_reporter(context, "copying ")
        )
        if session.out.wrote_json(StoredModels(folder=str(cache_folder()), models=tuple(records))):
            return
        for text in (*(record.source for record in records), *images):
            session.out.line(text)
        return
    if ":" not in source and folder.exists():
        source = f"{'dir' if folder.is_dir() else 'file'}:{source}"
    record = manifests.import_in_place(source, manifest, tell)
    session.out.step("model", f"{record.source}, {len(record.files)} files, hashed")
    _result(session, record)


@stackctl_command("lock")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it there instead of printing it.",
)
def lock(session: Session, source: str, output: Path | None) -> None:
    """Print the lock file of a fetched model.

    It has the commit, and the path, size and SHA-256 of each file.
    """
    from stackctl.deploy import model_integrity
    from stackctl.machine.files import write_atomically
    from stackctl.store.lockfile import lock_of
    from stackctl.values.base import to_json

    manifest = model_integrity.model_manifest(session.context(recover="no"))
    found = lock_of(manifest.find(source))
    if output is None:
        session.out.data(found)
        return
    write_atomically(output.absolute(), to_json(found))
    session.out.line(str(output))


@stackctl_command("export")
@click.argument("sources", nargs=-1, metavar="SOURCE... FOLDER", required=True)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="NAME",
    help="Export this image too; it must be on this machine.",
)
def export(session: Session, sources: tuple[str, ...], images: tuple[str, ...]) -> None:
    """Write fetched models, and images, to a folder for a machine without a network.

    On that machine: stackctl model import FOLDER
    """
    from stackctl.deploy import model_integrity
    from stackctl.store import model_export

    if len(sources) < 2 and not images:
        raise StackctlError(
            "missing SOURCE or FOLDER", hint="SOURCE... FOLDER", exit_code=ExitCode.USAGE
        )
    context = session.context(recover="no")
    manifest = model_integrity.model_manifest(context)
    records = [manifest.find(source) for source in sources[:-1]]
    folder = Path(sources[-1]).expanduser().absolute()
    done = model_export.export_models(
        records, images, folder, model_integrity.progress_reporter(context, "copying ")
    )
    if session.out.wrote_json(done):
        return
    session.out.line(f"{folder}: {len(done.models)} models, {len(done.images)} images")
    session.out.note(f"there: stackctl model import {folder}")


for _one in (show, catalogue, fetch, list_models, verify, remove, import_model, lock, export):
    command.add_command(_one)
