"""Checks unit files with the real generator, installs and removes them."""

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
from stackctl.machine import runner, trust
from stackctl.machine.files import remove_file, sync_folder, write_atomically
from stackctl.units import render
from stackctl.values.unit import UnitFile, UnitSet

#: What the generator says while all is well.
_CHATTER = re.compile(r"Loading source unit file|^\s*$|Looking for|quadlet-generator\[\d+\]: $")

#: A folder of files that are checked, by the process that made it.
_STAGE = re.compile(r"stage-(\d+)-")


def validate(context: Context, stack: str, files: Sequence[UnitFile], generator: str) -> None:
    """Run the installed Quadlet generator and systemd's own check over unit files.

    The generator drops a unit it cannot read, some versions without a word: so the service of each
    must appear in its output, and nothing may be said on the way.

    Raises:
        StackctlError: with the generator's or systemd's words.
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
        made = _generated(done.stdout)
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
        # Not below /tmp: nobody else can as much as look at it, wherever TMPDIR leads.
        trust.private_folder(runtime)
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


def sweep(runtime: Path) -> None:
    """Remove what a killed stackctl left of its checks."""
    for folder in runtime.glob("stage-*"):
        match = _STAGE.match(folder.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _generated(output: str) -> dict[str, str]:
    """The texts of the services in the generator's dry run, by name."""
    parts = re.split(r"^---(\S+)---$", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def installed(context: Context, stack: str) -> tuple[UnitFile, ...]:
    """The unit files of a stack as they are on disk; empty when it is not installed."""
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
    """Names of all stacks that have unit files."""
    try:
        return tuple(sorted(path.name for path in context.paths.units.iterdir() if path.is_dir()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StackctlError(f"cannot read {context.paths.units}: {error.strerror}") from None


def engine_file(stack: str, files: tuple[UnitFile, ...]) -> UnitFile | None:
    """The file that holds the stack's engine, among those of its folder; its first slot's first."""
    by_name = {file.name: file for file in files}
    names = (render.file_name(unit) for unit in render.engine_names(stack))
    return next((by_name[name] for name in names if name in by_name), None)


def add(context: Context, stack: str, files: tuple[UnitFile, ...]) -> None:
    """Write files into the stack's folder, each atomically; have systemd read them."""
    if write(context, stack, files):
        context.systemd.daemon_reload()


def write(context: Context, stack: str, files: tuple[UnitFile, ...]) -> bool:
    """Write files into the stack's folder, each atomically; whether any was not so already."""
    folder = context.paths.unit_folder(stack)
    changed = [file for file in files if _text(folder / file.name) != file.text]
    for file in changed:
        write_atomically(folder / file.name, file.text)
    return bool(changed)


def keep_only(context: Context, units: UnitSet) -> None:
    """Have exactly these engine files in the stack's folder, and have systemd know them."""
    changed = write(context, units.stack, units.files)
    wanted = {file.name for file in units.files}
    folder = context.paths.unit_folder(units.stack)
    for unit in render.engine_names(units.stack):
        name = render.file_name(unit)
        if name not in wanted and remove_file(folder / name):
            changed = True
    have_read(context, units.service, changed=changed)


def have_read(context: Context, service: str, *, changed: bool) -> None:
    """Have systemd read the files of a service, if they were ``changed`` or it has not yet: who
    wrote them may have been cut off before that."""
    if not changed:
        seen = context.systemd.show(service, "NeedDaemonReload", "LoadState")
        changed = seen.get("NeedDaemonReload") == "yes" or seen.get("LoadState") != "loaded"
    if changed:
        context.systemd.daemon_reload()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remove(context: Context, stack: str) -> None:
    """Remove the stack's files and empty folders, and have systemd forget it.

    Nothing is taken for done because the files are gone: who removed them may have been cut off.
    """
    folder = context.paths.unit_folder(stack)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        # Else a power loss may bring back what the journal says is gone.
        with contextlib.suppress(FileNotFoundError):
            sync_folder(folder.parent if folder.parent.exists() else folder.parent.parent)
    except OSError as error:
        raise StackctlError(f"cannot remove {folder}: {error.strerror or error}") from None
    context.systemd.daemon_reload()


def assert_loaded(context: Context, units: UnitSet) -> None:
    """A reload succeeds although a generator failed: make sure that systemd has this very unit."""
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


def refuse_foreign(context: Context, stack: str, service: str) -> None:
    """Refuse a stack whose service name belongs to something else on this machine."""
    seen = context.systemd.show(service, "LoadState", "SourcePath", "FragmentPath")
    ours = f"{context.paths.unit_folder(stack)}/"
    source = seen.get("SourcePath") or seen.get("FragmentPath", "")
    if seen.get("LoadState") in ("loaded", "masked") and not source.startswith(ours):
        raise StackctlError(
            f"there is already a {service} on this machine ({source})",
            hint="choose another name for the stack: --name NAME",
            exit_code=ExitCode.REFUSED,
        )
