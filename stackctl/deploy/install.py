"""Checks unit files with the real generator, installs and removes them."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner, trust
from stackctl.machine.files import sync_folder, write_atomically
from stackctl.values.unit import UnitFile, UnitSet

#: What the generator says while all is well.
_CHATTER = re.compile(r"Loading source unit file|^\s*$|Looking for|quadlet-generator\[\d+\]: $")


def validate(context: Context, units: UnitSet, generator: str) -> None:
    """Run the installed Quadlet generator and systemd's own check over the units.

    The generator drops a unit it cannot read, some versions without a word: so the service must
    appear in its output, and nothing may be said on the way.

    Raises:
        StackctlError: with the generator's or systemd's words.
    """
    with _stage(context.paths.runtime, units) as folder:
        flags = ("--user",) if context.systemd.scope == "user" else ()
        done = runner.run(
            (generator, *flags, "--dryrun"),
            check=False,
            extra_env={"QUADLET_UNIT_DIRS": str(folder)},
        )
        complaints = [line for line in done.stderr.splitlines() if not _CHATTER.search(line)]
        service = _generated(done.stdout, units.service)
        if done.status != 0 or service is None or complaints:
            raise StackctlError(
                f"Quadlet does not accept the unit of {units.stack}",
                details=complaints[-5:] or [f"{units.service} is missing from its output"],
                hint="this Podman may be older than the unit's keys, or a value is not valid; "
                "stackctl render shows the unit",
            )
        # Outside the folder that the generator reads, under the name that systemd expects.
        checked = folder.parent / units.service
        checked.write_text(service, encoding="utf-8")
        verdict = runner.run(
            (
                "systemd-analyze",
                *flags,
                "--man=no",
                "--recursive-errors=no",
                "verify",
                str(checked),
            ),
            check=False,
        )
        said = [line for line in verdict.stderr.splitlines() if units.service in line]
        if said:
            raise StackctlError(
                f"systemd does not accept the unit of {units.stack}",
                details=[line.replace(str(checked), units.service) for line in said[-5:]],
            )


@contextlib.contextmanager
def _stage(runtime: Path, units: UnitSet) -> Iterator[Path]:
    temporary = None
    try:
        # Not below /tmp: nobody else can as much as look at it, wherever TMPDIR leads.
        trust.make_private(runtime)
        temporary = Path(tempfile.mkdtemp(prefix="stage-", dir=runtime))
        folder = temporary / "units"
        folder.mkdir()
        for file in units.files:
            (folder / file.name).write_text(file.text, encoding="utf-8")
        yield folder
    except OSError as error:
        raise StackctlError(f"cannot write to {temporary or runtime}: {error.strerror}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _generated(output: str, service: str) -> str | None:
    """The text of one service in the generator's dry run."""
    parts = re.split(r"^---(\S+)---$", output, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return texts.get(service)


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


def install(context: Context, stack: str, files: tuple[UnitFile, ...]) -> None:
    """Put exactly these files in the stack's folder, each atomically; have systemd read them."""
    folder = context.paths.unit_folder(stack)
    for file in files:
        write_atomically(folder / file.name, file.text)
    wanted = {file.name for file in files}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    sync_folder(folder)
    context.systemd.daemon_reload()


def remove(context: Context, stack: str) -> None:
    """Remove the stack's files and empty folders, and have systemd forget it."""
    folder = context.paths.unit_folder(stack)
    if not folder.exists():
        return
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        context.paths.units.rmdir()
    context.systemd.daemon_reload()


def assert_loaded(context: Context, units: UnitSet) -> None:
    """A reload succeeds although a generator failed: make sure that systemd has this very unit."""
    seen = context.systemd.show(units.service, "LoadState", "SourcePath", "NeedDaemonReload")
    expected = context.paths.unit_folder(units.stack) / units.files[0].name
    if seen.get("LoadState") != "loaded" or seen.get("NeedDaemonReload") == "yes":
        raise StackctlError(
            f"systemd did not load {units.service} (state {seen.get('LoadState')})",
            hint="journalctl -b -t quadlet-generator tells why",
        )
    if Path(seen.get("SourcePath", "")) != expected:
        raise StackctlError(
            f"{units.service} comes from {seen.get('SourcePath') or 'elsewhere'}, not {expected}",
            hint="choose another name for the stack: --name NAME",
        )


def refuse_foreign(context: Context, units: UnitSet) -> None:
    """Refuse a stack whose service name belongs to something else on this machine."""
    seen = context.systemd.show(units.service, "LoadState", "SourcePath", "FragmentPath")
    ours = str(context.paths.unit_folder(units.stack))
    source = seen.get("SourcePath") or seen.get("FragmentPath", "")
    if seen.get("LoadState") in ("loaded", "masked") and not source.startswith(ours):
        raise StackctlError(
            f"there is already a {units.service} on this machine ({source})",
            hint="choose another name for the stack: --name NAME",
            exit_code=ExitCode.REFUSED,
        )
