"""``switch`` and ``rollback``: deploy another objective or profile, or an earlier generation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import msgspec

from stackctl.deploy import model_download, preflight, stack_state, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.lifecycle import (
    UpResult,
    exclusive_change,
    roll_out,
    serving_if_unchanged,
    up,
)
from stackctl.deploy.model_integrity import require_unchanged
from stackctl.deploy.new_generation import UpOptions
from stackctl.deploy.stack_state import InstalledStack, installed_generation
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.probe import probe
from stackctl.sources.profiles import Profiles
from stackctl.state.generations import utc_now
from stackctl.units import render
from stackctl.values.generation import Generation, Outcome
from stackctl.values.profile import Objective, Overrides, Profile


def stack_of(context: Context, word: str, profiles: Profiles) -> str | None:
    """Return the stack of a profile if it is installed; None if not, or for an objective."""
    if word in get_args(Objective):
        return None
    stack = _resolve_word(word, profiles).stack
    return stack if stack in unit_files.installed_stacks(context) else None


def resolve_target(current: Generation, word: str, profiles: Profiles) -> tuple[Profile, Overrides]:
    """Return the profile, with its overrides, that an objective or a name means for a stack.

    The overrides of ``up`` stay; --model only if the new profile names no other model. The name of
    the stack stays even if the key ``stack`` of the profile has been edited since.

    Raises:
        StackctlError: exit 4 for an unknown profile, exit 2 for a profile of another stack.
    """
    asked, stack, named = current.asked, current.stack, _profile_name(current)
    if word in get_args(Objective):
        wanted = msgspec.structs.replace(asked, objective=word)
        return _of_stack(stack, named, wanted, profiles)
    own, present = _resolve_word(word, profiles), profiles.resolve(named, Overrides())
    # A profile with another model is meant for that model; otherwise the model of --model stays.
    model = asked.model if own.model in (None, present.model) else None
    wanted = Overrides(sets=asked.sets, model=model, name=asked.name)
    if own.stack not in (stack, present.stack):
        raise StackctlError(
            f"{word} runs as a stack of its own, {own.stack}: it does not replace {stack}",
            hint=f"stackctl up {word}; or in the place of {stack}: stackctl up {word} "
            f"--name {stack}",
            exit_code=ExitCode.USAGE,
        )
    return _of_stack(stack, word, wanted, profiles)


def _resolve_word(word: str, profiles: Profiles) -> Profile:
    """Return a profile. The hint for an unknown name has the objectives too, which also fit."""
    try:
        return profiles.resolve(word, Overrides())
    except StackctlError as error:
        if error.exit_code == ExitCode.NOT_FOUND and error.hint is not None:
            error.hint += "\nobjectives: " + ", ".join(get_args(Objective))
        raise


def _of_stack(
    stack: str, word: str, wanted: Overrides, profiles: Profiles
) -> tuple[Profile, Overrides]:
    """Return a profile under the name of this stack: another name would make a second stack."""
    profile = profiles.resolve(word, wanted)
    if profile.stack != stack:
        wanted = msgspec.structs.replace(wanted, name=stack)
        profile = profiles.resolve(word, wanted)
    return profile, wanted


def _profile_name(generation: Generation) -> str:
    """Return the name or the path by which the generation's profile was given."""
    files = generation.profile.files if generation.profile is not None else ()
    if files and Path(files[0]).is_file():
        return files[0] if "/" in generation.plan.profile else generation.plan.profile
    return generation.plan.profile


def switch(
    context: Context,
    stack: str,
    word: str,
    profiles: Profiles,
    options: UpOptions,
    *,
    auto_fit: bool = False,
) -> UpResult:
    """Serve a stack with another objective or profile.

    Raises:
        StackctlError: exit 3 if the stack is not up; else as ``up``.
    """
    current = installed_generation(context, stack)
    profile, asked = resolve_target(current, word, profiles)
    model_download.ensure_model(context, profile, options)

    def fit(sets: tuple[str, ...]) -> tuple[Profile, Overrides]:
        wanted = msgspec.structs.replace(asked, sets=(*asked.sets, *sets))
        return profiles.resolve(profile.name, wanted), wanted

    return up(
        context,
        profile,
        dataclasses.replace(
            options, asked=asked, operation="switch", fit=fit if auto_fit else None
        ),
    )


def rollback(context: Context, stack: str, number: int | None, options: UpOptions) -> UpResult:
    """Deploy the stored text of a generation as a new generation; nothing is planned again.

    Without a number take the last generation before the present one that was ready.

    Raises:
        StackctlError: exit 4 if there is none, exit 6 if its image or model is gone.
    """
    with exclusive_change(context, f"rollback {stack}", options.dry_run):
        context.systemd.require()
        host = probe(context.machine, scope=context.paths.scope)
        generator = preflight.require_tools(host)
        before = stack_state.inspect_stack(context, stack)
        target = _target(context, stack, number, before)
        _require_there(target)
        require_unchanged(context, target.plan.model)
        new = _again(context, target, before)
        if current := serving_if_unchanged(context, new, before, options):
            return UpResult("unchanged", current.plan, current.units, current)
        done = roll_out(context, new, before, host, options, generator)
        return UpResult("started" if done else "none", new.plan, new.units, done)


def _target(context: Context, stack: str, number: int | None, before: InstalledStack) -> Generation:
    store = context.generations
    if number is not None:
        return store.read(stack, number)
    current = before.generation
    found = store.rollback_target(stack, None if current is None else current.number)
    if found is None:
        raise StackctlError(
            f"{stack} has no earlier generation that was ready",
            hint=f"stackctl history {stack}",
            exit_code=ExitCode.NOT_FOUND,
        )
    return found


def _require_there(target: Generation) -> None:
    """Raise StackctlError (exit 6) if the model or an image of a stored generation is gone."""
    for file in target.plan.model.files:
        path = Path(file.path)
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise StackctlError(
                f"generation {target.number} cannot run again: {path} "
                + ("has changed" if path.is_file() else "is gone"),
                hint=f"stackctl history {target.stack} lists others",
                exit_code=ExitCode.HOST,
            )
    doors = (target.door.image,) if target.door is not None else ()
    for image in (target.plan.image, *doors):
        if not podman.image_exists(image):
            raise StackctlError(
                f"generation {target.number} cannot run again: image {image[:72]} is gone",
                hint=f"podman pull it, or stackctl history {target.stack} lists others",
                exit_code=ExitCode.HOST,
            )


def _again(context: Context, target: Generation, before: InstalledStack) -> Generation:
    number = max((0, *context.generations.numbers(target.stack))) + 1
    unit = preflight.free_slot(target.stack, before.unit) if before.unit else target.stack
    return msgspec.structs.replace(
        target,
        number=number,
        created=utc_now(),
        operation="rollback",
        of=target.number if target.of is None else target.of,
        units=render.relabel(target.units, number, unit),
        strategy=None,
        outcome=Outcome(state="starting", changed=utc_now()),
    )
