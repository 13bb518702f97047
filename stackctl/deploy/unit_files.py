"""Checks unit files with the installed Quadlet generator, installs and removes them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security, runner
from stackctl.machine.files import remove_file, sync_folder, write_atomically
from stackctl.units import render
from stackctl.values.generation import UnitFile, UnitSet

#: Messages of the generator that report no problem.
_CHATTER = re.compile(r"Loading source unit file|^\s*$|Looking for|quadlet-generator\[\d+\]: $")

#: Name of a folder of files to check; it holds the id of the process that made it.
_STAGE = re.compile(r"stage-(\d+)-")


def validate(context: Context, stack: str, files: Sequence[UnitFile], generator: str) -> None:
    """Check unit files with the installed Quadlet generator and with systemd-analyze.

    The generator drops a unit that it cannot read, in some versions without a message. So each
    service must appear in its output, and every unexpected message is a failure.

    Raises:
        StackctlError: with the messages of the generator or of systemd.
    """
    services = [render.service_name(file.name.removesuffix(".container")) for file in files]
    with _stage(context.paths.runtime, files) as folder:
        flags = ("--user",) if context.systemd.scope == "user" else ()
        done = runner.run(
            (generator, *flags, "--dryrun"),
            check=False,
            extra_env={"QUADLET_UNIT_DIRS": str(folder)},
        )
        complaints = [line for line in done.stderr.splitlines() if not _CHATTER.search(line)]
        # Names and texts of the services, in turn.
        parts = re.split(r"^---(\S+)---$", done.stdout, flags=re.MULTILINE)
        made = dict(zip(parts[1::2], parts[2::2], strict=True))
        complaints += [
            f"{name} is missing from its output" for name in services if name not in made
        ]
        if done.status != 0 or complaints:
            raise StackctlError(
                f"Quadlet does not accept the unit of {stack}",
                details=complaints[-5:],
                hint="this Podman may be older than the unit's keys, or a value is not valid; "
                "stackctl render shows the unit",
            )
        # Outside the folder that the generator reads, under the names that systemd expects.
        for name in services:
            (folder.parent / name).write_text(made[name], encoding="utf-8")
        options = (*flags, "--man=no", "--recursive-errors=no")
        paths = (str(folder.parent / name) for name in services)
        verdict = runner.run(("systemd-analyze", *options, "verify", *paths), check=False)
        said = [
            line.replace(f"{folder.parent}/", "")
            for line in verdict.stderr.splitlines()
            if any(name in line for name in services)
        ]
        if said:
            raise StackctlError(f"systemd does not accept the unit of {stack}", details=said[-5:])


@contextlib.contextmanager
def _stage(runtime: Path, files: Sequence[UnitFile]) -> Iterator[Path]:
    temporary = None
    try:
        # A private folder, unlike /tmp or TMPDIR: no other user can read it.
        path_security.make_private_folder(runtime)
        temporary = Path(tempfile.mkdtemp(prefix=f"stage-{os.getpid()}-", dir=runtime))
        folder = temporary / "units"
        folder.mkdir()
        for file in files:
            (folder / file.name).write_text(file.text, encoding="utf-8")
        yield folder
    except OSError as error:
        raise StackctlError(f"cannot write to {temporary or runtime}: {error.strerror}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_stale_staging(runtime: Path) -> None:
    """Remove the folders of checks whose process was killed."""
    for folder in runtime.glob("stage-*"):
        match = _STAGE.match(folder.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def installed(context: Context, stack: str) -> tuple[UnitFile, ...]:
    """Return the unit files of a stack as they are on disk; empty if it is not installed."""
    folder = context.paths.unit_folder(stack)
    try:
        return tuple(
            UnitFile(name=path.name, text=path.read_text(encoding="utf-8", errors="replace"))
            for path in sorted(folder.iterdir())
            if path.is_file()
        )
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StackctlError(f"cannot read {folder}: {error.strerror}") from None


def installed_stacks(context: Context) -> tuple[str, ...]:
    """Return the names of all stacks that have a folder of unit files."""
    try:
        return tuple(sorted(path.name for path in context.paths.units.iterdir() if path.is_dir()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StackctlError(f"cannot read {context.paths.units}: {error.strerror}") from None


def engine_file(stack: str, files: tuple[UnitFile, ...]) -> UnitFile | None:
    """Return the unit file of the stack's engine, the first slot's first; None without one."""
    by_name = {file.name: file for file in files}
    names = (render.unit_file_name(unit) for unit in render.engine_unit_names(stack))
    return next((by_name[name] for name in names if name in by_name), None)


def add(context: Context, stack: str, files: tuple[UnitFile, ...]) -> None:
    """Write files into the stack's folder, each atomically; reload systemd if any has changed."""
    if write(context, stack, files):
        context.systemd.daemon_reload()


def write(context: Context, stack: str, files: tuple[UnitFile, ...]) -> bool:
    """Write files into the stack's folder, each atomically; return True if any has changed."""
    folder = context.paths.unit_folder(stack)
    changed = [file for file in files if read_text(folder / file.name) != file.text]
    for file in changed:
        write_atomically(folder / file.name, file.text)
    return bool(changed)


def install_exactly(context: Context, units: UnitSet) -> None:
    """Write these engine files, remove the other slot's, and reload systemd if necessary."""
    changed = write(context, units.stack, units.files)
    wanted = {file.name for file in units.files}
    folder = context.paths.unit_folder(units.stack)
    for unit in render.engine_unit_names(units.stack):
        name = render.unit_file_name(unit)
        if name not in wanted and remove_file(folder / name):
            changed = True
    ensure_loaded(context, units.service, changed=changed)


def ensure_loaded(context: Context, service: str, *, changed: bool) -> None:
    """Reload systemd if the files of a service have ``changed``, or are not loaded yet.

    An earlier stackctl may have been interrupted between writing and reloading.
    """
    if not changed:
        seen = context.systemd.show(service, "NeedDaemonReload", "LoadState")
        changed = seen.get("NeedDaemonReload") == "yes" or seen.get("LoadState") != "loaded"
    if changed:
        context.systemd.daemon_reload()


def read_text(path: Path) -> str | None:
    """Return the text of a file; None if it is absent, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remove_units(context: Context, stack: str) -> None:
    """Remove the stack's files and empty folders, and reload systemd.

    Systemd is reloaded even if the files are gone: an earlier removal may have been interrupted.
    """
    folder = context.paths.unit_folder(stack)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        # Without this a power loss may bring back files that the journal records as removed.
        with contextlib.suppress(FileNotFoundError):
            sync_folder(folder.parent if folder.parent.exists() else folder.parent.parent)
    except OSError as error:
        raise StackctlError(f"cannot remove {folder}: {error.strerror or error}") from None
    context.systemd.daemon_reload()


def assert_loaded(context: Context, units: UnitSet) -> None:
    """Check that systemd has loaded this unit; a reload succeeds even if a generator failed.

    Raises:
        StackctlError: the unit is not loaded, or comes from another file.
    """
    seen = context.systemd.show(units.service, "LoadState", "SourcePath", "NeedDaemonReload")
    expected = context.paths.unit_folder(units.stack) / units.files[0].name
    if seen.get("LoadState") != "loaded" or seen.get("NeedDaemonReload") == "yes":
        raise StackctlError(
            f"systemd did not load {units.service} (state {seen.get('LoadState')})",
            hint="the reason: journalctl -b -t quadlet-generator",
        )
    if Path(seen.get("SourcePath", "")) != expected:
        raise StackctlError(
            f"{units.service} comes from {seen.get('SourcePath') or 'elsewhere'}, not {expected}",
            hint="choose another name for the stack: --name NAME",
        )


def require_own_service(context: Context, stack: str, service: str) -> None:
    """Raise StackctlError (exit 5) if another unit of this machine has the service's name."""
    seen = context.systemd.show(service, "LoadState", "SourcePath", "FragmentPath")
    ours = f"{context.paths.unit_folder(stack)}/"
    source = seen.get("SourcePath") or seen.get("FragmentPath", "")
    if seen.get("LoadState") in ("loaded", "masked") and not source.startswith(ours):
        raise StackctlError(
            f"there is already a {service} on this machine ({source})",
            hint="choose another name for the stack: --name NAME",
            exit_code=ExitCode.REFUSED,
        )
