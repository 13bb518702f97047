"""The present state of a stack: its unit, and its installed generation."""

from __future__ import annotations

from dataclasses import dataclass

from stackctl.deploy import unit_files
from stackctl.deploy.context import Context
from stackctl.errors import ExitCode, StackctlError
from stackctl.units import render
from stackctl.values.generation import Generation, UnitFile


@dataclass(frozen=True)
class InstalledStack:
    """A stack before a change: the file and unit of its engine, its generation, and its state.

    Without a unit file, ``unit`` names an engine that still runs; None if there is none.
    """

    file: UnitFile | None
    unit: str | None
    generation: Generation | None
    state: str

    @property
    def is_active(self) -> bool:
        """Return True if systemd reports the unit as active: the engine has answered once."""
        return self.state == "active"

    @property
    def meant_to_run(self) -> bool:
        """Return True if the engine runs or starts: a reverted change starts it again."""
        return self.state in ("active", "activating", "reloading")

    @property
    def is_stopped(self) -> bool:
        """Return True if no process of the engine can collide with a start."""
        return self.state in ("inactive", "failed")


def inspect_stack(context: Context, stack: str) -> InstalledStack:
    """Return the present state of a stack.

    Raises:
        StackctlError: the stack is installed, but its generation has no readable record.
    """
    file = unit_files.engine_file(stack, unit_files.installed(context, stack))
    if file is None:
        return _without_file(context, stack)
    unit = file.name.removesuffix(".container")
    state = context.systemd.show(render.service_name(unit), "ActiveState")["ActiveState"]
    number = render.generation_of(file.text)
    if number is None:
        problem = f"the unit of {stack} was changed by hand: it names no generation"
    elif number not in context.generations.numbers(stack):
        problem = f"the record of generation {number} of {stack}, which is installed, is gone"
    else:
        return InstalledStack(file, unit, context.generations.read(stack, number), state)
    raise StackctlError(problem, hint=f"stackctl down {stack}, then up again")


def _without_file(context: Context, stack: str) -> InstalledStack:
    """Return the state without a unit file; an engine may still run after the file was removed."""
    ours = f"{context.paths.unit_folder(stack)}/"
    for unit in render.engine_unit_names(stack):
        service = render.service_name(unit)
        seen = context.systemd.show(service, "ActiveState", "LoadState", "SourcePath")
        known = seen.get("LoadState") == "not-found" or seen.get("SourcePath", "").startswith(ours)
        if known and seen["ActiveState"] not in ("inactive", "failed"):
            return InstalledStack(None, unit, None, seen["ActiveState"])
    return InstalledStack(None, None, None, "inactive")


def installed_number(context: Context, stack: str) -> int | None:
    """Return the number of the installed generation; None if there is none."""
    numbers = (render.generation_of(file.text) for file in unit_files.installed(context, stack))
    return next((number for number in numbers if number is not None), None)


def installed_generation(context: Context, stack: str) -> Generation:
    """Return the installed generation. Raise StackctlError (exit 3) if there is none."""
    if unit_files.engine_file(stack, unit_files.installed(context, stack)) is None:
        raise not_running(stack)
    found = inspect_stack(context, stack).generation
    if found is None:
        raise not_running(stack)
    return found


def latest_generation(context: Context, stack: str) -> Generation:
    """Return the installed generation, else the last that served, else the last of all.

    Raises:
        StackctlError: exit 4 if the stack has no generation.
    """
    number = installed_number(context, stack)
    if number is not None:
        return context.generations.read(stack, number)
    found = [
        context.generations.read(stack, number)
        for number in reversed(context.generations.numbers(stack))
    ]
    served = [one for one in found if one.outcome.state not in ("failed", "interrupted")]
    if not found:
        raise StackctlError(
            f"{stack} has no generation",
            hint=f"stackctl up {stack}",
            exit_code=ExitCode.NOT_FOUND,
        )
    return (served or found)[0]


def not_running(stack: str) -> StackctlError:
    """Return the error (exit 3) for a stack that is not up."""
    code = ExitCode.NOT_RUNNING
    return StackctlError(f"{stack} is not up", hint="stackctl up PROFILE", exit_code=code)
