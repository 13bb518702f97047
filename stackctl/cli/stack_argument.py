"""The stack that a command is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from stackctl.cli.session import GLOBAL_NAMES, Session, make_session
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context
    from stackctl.values.generation import Generation
    from stackctl.values.profile import Slo


def _stack_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    scope = context.params.get("scope")
    session = make_session({**dict.fromkeys(GLOBAL_NAMES), "scope": scope})
    from stackctl.state.generations import Generations

    paths = session.paths()
    found = {path.name for path in paths.units.iterdir()} if paths.units.is_dir() else set()
    found |= set(Generations(paths.state).stacks())
    return sorted(name for name in found if name.startswith(incomplete))


stack_argument = click.argument("stack", required=False, shell_complete=_stack_names)


#: The number of a generation in a command line.
_NUMBER = re.compile("[0-9]{1,9}")


def pick_stack(context: Context, name: str | None, *, past: bool = False) -> str:
    """Return the stack with that name or with a profile of that name; None: the only stack.

    A stack with that name may be down if it was ever up. With ``past`` the only stack may be down
    too, if no other stack is up.

    Raises:
        StackctlError: exit 3 if no stack is up, 4 if none has that name, 2 if there are several
            and ``name`` is None.
    """
    from stackctl.deploy import unit_files
    from stackctl.units.render import profile_of

    up = unit_files.installed_stacks(context)
    known = tuple(dict.fromkeys((*up, *context.generations.stacks())))
    if name is None:
        found = up or (known if past else ())
        if len(found) == 1:
            return found[0]
        if not found:
            raise StackctlError(
                "no stack is up", hint="stackctl up PROFILE", exit_code=ExitCode.NOT_RUNNING
            )
        raise StackctlError(
            "missing STACK: several stacks are up", hint=", ".join(found), exit_code=ExitCode.USAGE
        )
    if name in known:
        return name
    for stack in up:
        file = unit_files.engine_file(stack, unit_files.installed(context, stack))
        if file is not None and profile_of(file.text) == name:
            return stack
    raise StackctlError(
        f"no stack named {name}",
        hint="stacks: " + (", ".join(known) or "none is up"),
        exit_code=ExitCode.NOT_FOUND,
    )


def current_slo(session: Session, generation: Generation) -> Slo | None:
    """Return the SLO in the present file of a generation's profile, which may have changed.

    If the profile is missing or not valid, return the SLO that was stored with the generation.
    """
    try:
        return session.profiles().resolve(generation.plan.profile, generation.asked).slo
    except StackctlError:
        return generation.profile.slo if generation.profile else None


def stack_and_numbers(words: Sequence[str], most: int) -> tuple[str | None, tuple[int, ...]]:
    """Return the stack and the generations of ``[STACK] [N]...``; None if no stack is named.

    Raises StackctlError (exit 2) if there are two stacks or more than ``most`` generations.
    """
    names = [word for word in words if not _NUMBER.fullmatch(word)]
    numbers = tuple(int(word) for word in words if _NUMBER.fullmatch(word))
    if len(names) > 1 or len(numbers) > most or (names and words[0] != names[0]):
        raise StackctlError(
            f"unexpected arguments: {' '.join(words)}",
            hint="the stack first, then " + ("a generation" if most == 1 else "two generations"),
            exit_code=ExitCode.USAGE,
        )
    return (names[0] if names else None), numbers
