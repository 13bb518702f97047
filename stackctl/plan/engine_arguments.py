"""Turns options into arguments: the user's win, and an image gets only options that it has."""

from __future__ import annotations

from collections.abc import Mapping

from stackctl.engines.options import Dialect, Option
from stackctl.engines.protocol import Engine
from stackctl.errors import ExitCode, StackctlError, did_you_mean
from stackctl.values.profile import Profile


def apply_engine_args(
    engine: Engine, dialect: Dialect, planned: tuple[Option, ...], profile: Profile
) -> dict[str, Option]:
    """Return the planned options, replaced by the user's; reasons name the planned values.

    Raises:
        StackctlError: exit 2 for options that stackctl sets itself or that the image lacks.
    """
    options = {option.name: option for option in planned}
    for argument in profile.engine_args:
        name = argument.name
        overridden = f"engine_args.{name}" in profile.overrides
        where = f"--set engine_args.{name}" if overridden else f"profile {profile.name}: {name}"
        known = dialect.find(name)
        aliases = [other[2:] for other in known.names] if known else []
        for one in (name, *aliases):
            if one in engine.reserved_options:
                raise StackctlError(
                    f"{where}: set by stackctl itself",
                    hint=engine.reserved_options[one],
                    exit_code=ExitCode.USAGE,
                )
        if known is None and dialect.inspected and argument.values is not None:
            raise StackctlError(
                f"{where}: this image's {engine.program} has no option --{name}",
                hint=did_you_mean(name, dialect.option_names(), f"see {engine.program} --help"),
                exit_code=ExitCode.USAGE,
            )
        # An option set by its second name replaces the planned one and keeps its place, but not its
        # name: --no-jinja is the second name of --jinja.
        same = next((other for other in aliases if other in options), name)
        before = options.get(same)
        reason = "engine_args"
        if before is not None and before.values != argument.values:
            shown = "nothing" if before.values is None else before.value
            reason += f"; the plan had {shown}: {before.reason}"
        options[same] = Option(
            name, argument.values, reason, "override" if overridden else "profile"
        )
    return options


def render_arguments(
    engine: Engine, dialect: Dialect, options: Mapping[str, Option]
) -> tuple[tuple[str, ...], dict[str, Option]]:
    """Return the engine's arguments, and all options; those that the image lacks have no value."""
    argv = [engine.program]
    kept: dict[str, Option] = {}
    for name, option in options.items():
        tokens = engine.render_option(option, dialect)
        if tokens is None and (dialect.inspected or dialect.find(name)):
            reason = f"left out: this image has no --{name} ({option.reason})"
            kept[name] = Option(name, None, reason, option.source)
            continue
        if tokens is None:
            # The user's option for an image that was not inspected is passed on unchecked.
            tokens = tuple(
                token
                for value in option.values or (True,)
                for token in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
            )
        argv.extend(tokens)
        kept[name] = option
    return tuple(argv), kept
