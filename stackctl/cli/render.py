"""``stackctl render``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.plan import facts_option
from stackctl.cli.planning import make_plan
from stackctl.cli.session import Session, overrides, plan_options, profile_argument, verb
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.engines.protocol import Engine


@verb("render")
@profile_argument
@plan_options
@facts_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write to; default: stdout."
)
def command(
    session: Session,
    profile: str,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
    facts: Path | None,
    output: Path | None,
) -> None:
    """Write the units of PROFILE without installing or starting anything."""
    from stackctl.deploy import gpu
    from stackctl.engines import engine
    from stackctl.machine.files import write_atomically
    from stackctl.plan.ledger import claim_of
    from stackctl.units.door import door_of, render_door
    from stackctl.units.render import Target, render
    from stackctl.values.result import UnitsReport

    wanted = overrides(sets, model, objective, name)
    resolved = session.profiles().resolve(profile, wanted)
    planned = make_plan(session, resolved, facts)
    plan, known, host, image = planned.plan, planned.facts, planned.host, planned.door
    if known is None:
        session.out.warn(
            f"image {plan.image} was not looked at: not pinned, and its options not checked"
        )
    program, entrypoint = (
        (known.program, known.entrypoint) if known else _starting(plan.image, engine(plan.engine))
    )
    target = Target(
        scope=session.scope,
        podman=host.tools.podman,
        image=plan.image,
        program=program,
        entrypoint=entrypoint,
        claim=claim_of(plan),
        devices=gpu.names(gpu.planned(host, plan)),
        cache=str(session.paths().compiled(known.image_id if known else "IMAGE")),
    )
    units = render(plan, target, 0)
    files = [*units.files]
    if image is not None:
        door = door_of(resolved, plan, image)
        made = render_door(
            plan.stack,
            door,
            scope=session.scope,
            podman=host.tools.podman,
            folder=str(session.paths().door_folder(plan.stack)),
        )
        files += [made.unit, *made.files]
    if session.out.json:
        report = UnitsReport(stack=units.stack, service=units.service, files=tuple(files))
        session.out.data(report)
    for file in files:
        if output is None:
            if not session.out.json:
                session.out.line(file.text.rstrip("\n"))
            continue
        if output.exists() and not output.is_dir():
            raise StackctlError(f"{output} is not a folder", exit_code=ExitCode.USAGE)
        write_atomically(output / file.name, file.text)
        if not session.out.json:
            session.out.line(str(output / file.name))


def _starting(image: str, engine: Engine) -> tuple[tuple[str, ...], str | None]:
    """Images built here have no entry point; others are taken to be like the engine's own."""
    from stackctl.deploy.images import starting

    local = image in (engine.local_image, engine.cpu_image)
    return starting(engine, () if local else engine.published_entrypoint)
