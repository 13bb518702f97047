"""Options and arguments that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stackctl.cli.session import GLOBAL_NAMES, make_session

if TYPE_CHECKING:
    from stackctl.deploy.transaction import RolloutTimeouts


def _profile_names(context: click.Context, _: Any, incomplete: str) -> list[str]:
    folder = context.params.get("profile_folder")
    session = make_session(dict.fromkeys(GLOBAL_NAMES), profile_folder=folder)
    return [name for name in session.profiles().names() if name.startswith(incomplete)]


profile_argument = click.argument("profile", shell_complete=_profile_names)


_PLAN = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a key of the profile, e.g. context=4096; may be repeated.",
    ),
    click.option("--model", metavar="SOURCE", help="The model, e.g. file:/srv/models/m.gguf."),
    click.option(
        "--objective",
        type=click.Choice(["latency", "throughput"]),
        help="Objective to plan for; default: the profile's.",
    ),
    click.option("--name", metavar="NAME", help="Name of the stack; the profile has a default."),
    click.option(
        "--profiles",
        "profile_folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Search this folder of profiles first.",
    ),
)


def plan_options(command: Any) -> Any:
    """Add the options of all commands that plan."""
    for option in reversed(_PLAN):
        command = option(command)
    return command


def overrides(
    sets: tuple[str, ...], model: str | None, objective: str | None, name: str | None
) -> Any:
    """Return the overrides of a profile from the options of a planning command."""
    from stackctl.values.profile import Overrides

    return Overrides(sets=sets, model=model, objective=objective, name=name)


def duration(_: Any, __: Any, value: str | None) -> float | None:
    """Parse the value of an option, such as 90s or 10m, into seconds; None if it is not given."""
    from stackctl.quantity import parse_duration

    return None if value is None else parse_duration(value)


def timeout_option(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option --timeout, with a duration such as 90s or 10m."""
    return click.option("--timeout", metavar="DURATION", callback=duration, help=help_text)


fit_option = click.option(
    "--auto-fit",
    is_flag=True,
    help="If the engine reports a size that would fit, start once more with it.",
)


drain_option = click.option(
    "--drain",
    metavar="DURATION",
    callback=duration,
    help="How long running requests may take to end (60s); 0s cuts them off.",
)


soak_option = click.option(
    "--soak",
    metavar="DURATION",
    callback=duration,
    help="How long the new engine is watched before the old one is given up (5s).",
)


def rollout_timeouts(drain: float | None, soak: float | None) -> RolloutTimeouts:
    """Return the patience from --drain and --soak, in seconds; None stands for the default."""
    from stackctl.deploy.transaction import RolloutTimeouts

    usual = RolloutTimeouts()
    return RolloutTimeouts(
        drain_s=usual.drain_s if drain is None else drain,
        soak_s=usual.soak_s if soak is None else soak,
    )


yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
