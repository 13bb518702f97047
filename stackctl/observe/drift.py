"""Differences from the deployed state: unit files, systemd's settings, running arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stackctl.deploy import proxy
from stackctl.deploy.context import Context
from stackctl.diagnose.verify_process import argv_difference
from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.systemd import UnitState
from stackctl.values.generation import Generation
from stackctl.values.inspection import Drift, DriftCode


def find_drift(
    context: Context, generation: Generation, state: UnitState, pid: int
) -> tuple[Drift, ...]:
    """Return the differences between a generation as it was stored and the machine now.

    ``state`` is that of the engine's unit, ``pid`` its container's main process (0: it does not
    run).
    """
    texts: tuple[tuple[DriftCode, Iterator[str]], ...] = (
        ("unit", _files(context, generation)),
        ("door", _door(context, generation)),
        ("systemd", _systemd(context, generation, state)),
        ("arguments", _arguments(context.machine, generation, pid)),
    )
    return tuple(Drift(code=code, text=text) for code, lines in texts for text in lines)


def _files(context: Context, generation: Generation) -> Iterator[str]:
    folder = context.paths.unit_folder(generation.stack)
    for file in generation.units.files:
        path = folder / file.name
        yield from _file(path, str(path), file.text, "was changed by hand")
    # Quadlet reads drop-ins from a folder named after the file.
    for file in generation.units.files:
        added = sorted((folder / f"{file.name}.d").glob("*.conf"))
        yield from (f"{path} was added by hand" for path in added)


def _file(path: Path, name: str, text: str, otherwise: str) -> Iterator[str]:
    try:
        same = path.read_text("utf-8", "replace") == text
    except FileNotFoundError:
        yield f"{name} is missing"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"
    else:
        if not same:
            yield f"{name} {otherwise}"


def _door(context: Context, generation: Generation) -> Iterator[str]:
    """Compare the front door's unit with a newly rendered one, because its text is not stored.

    Another version of stackctl or Podman renders another text.
    """
    if generation.door is None:
        return
    try:
        unit = proxy.unit_file(context, generation.stack, generation.door)
    except StackctlError:
        # Without Podman the unit cannot be rendered.
        return
    path = context.paths.unit_folder(generation.stack) / unit.name
    name = f"the front door's {unit.name}"
    yield from _file(path, name, unit.text, "is not as this stackctl writes it")


def _systemd(context: Context, generation: Generation, state: UnitState) -> Iterator[str]:
    service = generation.units.service
    # Drop-ins in other folders, such as service.d, belong to the distribution.
    paths = map(Path, state.drop_ins)
    yield from (f"{path} was added by hand" for path in paths if path.parent.name == f"{service}.d")
    if state.needs_reload:
        flag = " --user" if context.paths.scope == "user" else ""
        yield (
            f"systemd has not read {service} since it was changed: systemctl{flag} daemon-reload"
        )


def _arguments(machine: Machine, generation: Generation, pid: int) -> Iterator[str]:
    raw = machine.read(f"/proc/{pid}/cmdline") if pid else None
    if not raw:
        return
    difference = argv_difference(tuple(raw.split("\0")[:-1]), generation.plan.argv)
    if difference is not None:
        yield f"the running engine's arguments are not the plan's: {difference}"
