"""``stackctl profiles``."""

from __future__ import annotations

import json

import click

from stackctl.cli.session import Session, overrides, plan_options, verb
from stackctl.values.profile import PlacementWish


class _Default(click.Group):
    """``profiles`` alone lists."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not any(name in args for name in (*self.commands, "--help", "-h")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("profiles", cls=_Default)
def command() -> None:
    """List, show and describe profiles. Without a subcommand: list."""


@verb("list")
@plan_options
def list_profiles(session: Session, **_: object) -> None:
    """List the profiles and what they are for."""
    from stackctl.errors import StackctlError
    from stackctl.values.profile import Overrides

    profiles = session.profiles()
    rows: list[tuple[str, str, str, str]] = []
    for name in profiles.names():
        try:
            profile = profiles.resolve(name, Overrides())
            rows.append((name, profile.stack, profile.objective, profile.description or ""))
        except StackctlError as error:
            rows.append((name, "-", "-", f"not valid: {error.message}"))
    if session.out.json:
        keys = ("name", "stack", "objective", "description")
        listed = [dict(zip(keys, row, strict=True)) for row in rows]
        document = {"schema": "stackctl.profiles/1", "profiles": listed}
        session.out.line(json.dumps(document, indent=2, ensure_ascii=False))
        return
    session.out.table(("PROFILE", "STACK", "OBJECTIVE", "WHAT"), rows, fold=3)


@verb("show")
@click.argument("profile_name", metavar="NAME")
@plan_options
def show(
    session: Session,
    profile_name: str,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
) -> None:
    """Show profile NAME as it applies.

    With all that it extends, its objective and the overrides.
    """
    wanted = overrides(sets, model, objective, name)
    profile = session.profiles().resolve(profile_name, wanted)
    if session.out.json:
        session.out.data(profile)
        return
    rows = [
        ("engine", profile.engine),
        ("stack", profile.stack),
        ("objective", profile.objective),
        ("model", profile.model or "(none: --model)"),
        ("image", profile.image or "(chosen by stackctl)"),
        ("context", profile.context),
        ("concurrency", profile.concurrency),
        ("port", profile.port),
        ("served_name", ", ".join((profile.served_name or "(the model's file name)",
                                   *profile.other_names))),
        ("placement", _placement(profile.placement)),
        *(
            (f"engine_args.{argument.name}",
             "(left out)" if argument.values is None
             else " ".join(map(str, argument.values)) or "true")
            for argument in profile.engine_args
        ),
        *(("from", file) for file in profile.files),
    ]  # fmt: skip
    session.out.line(f"{profile.name}: {profile.description or ''}".rstrip(": "))
    shown = [(str(key), "(derived)" if value is None else str(value)) for key, value in rows]
    session.out.table(("KEY", "VALUE"), shown, fold=1)


def _placement(wish: PlacementWish) -> str:
    parts: list[str] = [wish.policy]
    parts += [f"nodes {wish.nodes}"] if wish.nodes is not None else []
    parts += [f"cpus {wish.cpus}"] if wish.cpus is not None else []
    return ", ".join(parts)


@verb("schema")
def schema(session: Session) -> None:
    """Print the JSON Schema of profile files, for editors."""
    from stackctl.sources.profiles import read_settings_schema

    session.out.line(json.dumps(read_settings_schema(), indent=2))


for _command in (list_profiles, show, schema):
    command.add_command(_command)
