"""``stackctl plan``, and planning for the other verbs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.session import Session, overrides, plan_options, profile_argument, verb
from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.values.host import Host
    from stackctl.values.measured import EngineFacts
    from stackctl.values.plan import Decision, Plan
    from stackctl.values.profile import Profile

facts_option = click.option(
    "--facts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan for the machine in this file (stackctl probe --json), not for this one.",
)


@verb("plan")
@profile_argument
@plan_options
@facts_option
@click.option("--explain", is_flag=True, help="Show every value with its reason.")
def command(
    session: Session,
    profile: str,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
    facts: Path | None,
    explain: bool,
) -> None:
    """Show what PROFILE would run here, whether it fits, and why. Touches nothing.

    Exits 5 when it does not fit; the plan is printed all the same.
    """
    wanted = overrides(sets, model, objective, name)
    plan, _, _ = make_plan(session, session.profiles().resolve(profile, wanted), facts)
    if session.out.json:
        session.out.data(plan)
    else:
        show(session, plan, explain=explain)
    if plan.verdict.fits is False:
        if session.out.json:
            raise click.exceptions.Exit(int(ExitCode.REFUSED))
        raise StackctlError(
            f"{plan.profile} does not fit",
            hint="\n".join(plan.verdict.alternatives),
            exit_code=ExitCode.REFUSED,
        )


def make_plan(
    session: Session, profile: Profile, facts: Path | None
) -> tuple[Plan, EngineFacts | None, Host]:
    """Plan without touching anything: facts of this machine or of a file, images as last seen."""
    from stackctl.deploy.images import known_image
    from stackctl.deploy.preflight import require_model
    from stackctl.engines import engine
    from stackctl.machine.files import LiveMachine
    from stackctl.plan.solve import solve
    from stackctl.sources.models import read_model
    from stackctl.state.enginefacts import EngineFactsCache
    from stackctl.values.base import from_json
    from stackctl.values.host import Host

    model = read_model(require_model(profile))
    if facts is not None:
        try:
            text = facts.read_bytes()
        except OSError as error:
            raise StackctlError(
                f"cannot read {facts}: {error.strerror}", exit_code=ExitCode.USAGE
            ) from None
        host = from_json(text, Host, where=str(facts))
        image, reason, known = engine(profile.engine).default_image, "not looked at", None
        if profile.image is not None:
            image, reason = profile.image, "profile"
    else:
        from stackctl.probe import probe

        host = probe(LiveMachine(), scope=session.scope)
        cache = EngineFactsCache(session.paths().cache)
        image, reason, known = known_image(profile, engine(profile.engine), cache)
    plan = solve(
        host=host, model=model, profile=profile, image=image, image_reason=reason, facts=known
    )
    return plan, known, host


def show(session: Session, plan: Plan, *, explain: bool) -> None:
    """A plan for people."""
    out = session.out
    out.line(f"{plan.profile} · {plan.objective} · {plan.engine} · {plan.served_name}")
    verdict = {True: "fits", False: "does not fit", None: "unknown"}[plan.verdict.fits]
    reasons = plan.verdict.reasons or ("",)
    color = {True: "green", False: "red", None: "yellow"}[plan.verdict.fits]
    for number, reason in enumerate(reasons):
        label = f"{verdict if number == 0 else '':<14}"
        for part, text in enumerate(_wrap(reason, 64)):
            out.line((out.style(label, color) if part == 0 else " " * 14) + text)
    if explain:
        out.line()
        rows = [
            (d.field, "(unset)" if d.value is None else _value(d.value), _why(d))
            for d in plan.decisions
        ]
        out.table(("FIELD", "VALUE", "WHY"), rows, fold=2)
    else:
        threads = next((d.value for d in plan.decisions if d.field == "threads"), None)
        context = next((d.value for d in plan.decisions if d.field == "ctx-size"), None)
        out.line(f"{'runs':<14}{threads or '?'} threads, context {context}, port {plan.port}")
        out.line(f"{'image':<14}{plan.image}")
        out.note(f"every value and its reason: stackctl plan {plan.profile} --explain")


def _why(decision: Decision) -> str:
    """The reason; the source where it is more than derived and the reason does not say it."""
    if decision.source in ("derived", "measured") or decision.source in decision.reason:
        return decision.reason
    return f"{decision.reason} ({decision.source})"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]
