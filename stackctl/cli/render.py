"""``stackctl render``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import facts_option, plan_options, profile_argument
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.planning import PlanBasis, PlanPreview
    from stackctl.values.profile import Overrides, Profile
    from stackctl.values.unit import UnitFile


@stackctl_command("render")
@profile_argument
@plan_options
@facts_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write to; default: stdout."
)
def command(
    session: Session,
    profile: str,
    asked: Overrides,
    facts: Path | None,
    output: Path | None,
) -> None:
    """Write the units of PROFILE without installing or starting anything."""
    from stackctl.deploy.planning import preview, unit_target
    from stackctl.units.render import render_units
    from stackctl.values.result import UnitsReport

    profiles = session.profiles()
    resolved = profiles.resolve(profile, asked)
    basis = session.plan_basis(facts)
    planned = preview(basis, profiles, resolved, session.out)
    image = planned.image
    if image.facts is None:
        session.out.warn(
            f"image {image.reference} was not looked at: not pinned, and its options not checked"
        )
    target = unit_target(basis.paths, basis.host, planned.plan, image.facts)
    units = render_units(planned.plan, target, 0)
    files = (*units.files, *_door_files(basis, resolved, planned))
    if session.out.json:
        report = UnitsReport(stack=units.stack, service=units.service, files=files)
        session.out.data(report)
    _write(session, files, output)


def _door_files(basis: PlanBasis, profile: Profile, planned: PlanPreview) -> tuple[UnitFile, ...]:
    """Return the unit and the files of the front door; empty for a stack without a door."""
    from stackctl.units.proxy_unit import make_proxy, render_proxy

    if planned.door is None:
        return ()
    stack = planned.plan.stack
    made = render_proxy(
        stack,
        make_proxy(profile, planned.plan, planned.door),
        scope=basis.paths.scope,
        podman=basis.host.tools.podman,
        folder=str(basis.paths.proxy_folder(stack)),
        apparmor=basis.host.tools.apparmor is True,
    )
    return (made.unit, *made.files)


def _write(session: Session, files: tuple[UnitFile, ...], output: Path | None) -> None:
    """Print the files, or write them to a folder and print their names; with --json print none."""
    from stackctl.machine.files import write_atomically

    for file in files:
        text = file.text.rstrip("\n")
        if output is not None:
            if output.exists() and not output.is_dir():
                raise StackctlError(f"{output} is not a folder", exit_code=ExitCode.USAGE)
            write_atomically(output / file.name, file.text)
            text = str(output / file.name)
        if not session.out.json:
            session.out.line(text)
