"""``stackctl doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from stackctl.cli.plan import facts_option
from stackctl.cli.session import Session, _profile_names, overrides, plan_options, verb
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.result import Result


@verb("doctor")
@click.argument("profile", required=False, shell_complete=_profile_names)
@plan_options
@facts_option
def command(
    session: Session,
    profile: str | None,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
    facts: Path | None,
) -> None:
    """Find what stands in the way on this host, of PROFILE or of any.

    Each finding with the command that fixes it. Exits 6 when something must be fixed first.
    """
    from stackctl.cli.planning import make_plan, read_host
    from stackctl.probe.doctor import findings
    from stackctl.values.result import DoctorReport

    results: list[Result] = []
    if profile is None:
        host = read_host(session, facts)
        results += findings(host)
    else:
        wanted = session.profiles().resolve(profile, overrides(sets, model, objective, name))
        host = read_host(session, facts)
        needs_gpu = wanted.engine == "vllm" or wanted.placement.gpus is not None
        weights: int | None = None
        cpuset = wanted.placement.cpus is not None or wanted.placement.nodes is not None
        try:
            plan = make_plan(session, wanted, facts).plan
            weights = None if needs_gpu else plan.model.weights_bytes
            cpuset = cpuset or plan.placement.policy == "interleave"
            results.append(
                _plan_result(plan.verdict.fits, plan.verdict.viable, plan.verdict.reasons)
            )
        except StackctlError as error:
            results.append(
                Result(name="plan", status="fail", actual=error.message, remedy=error.hint)
            )
        results += findings(host, memlock_bytes=weights, needs_cpuset=cpuset, needs_gpu=needs_gpu)
    order = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 4}
    results.sort(key=lambda result: order[result.status])
    if session.out.json:
        session.out.data(DoctorReport(profile=profile, results=tuple(results)))
    else:
        session.out.results(results)
    if any(result.status == "fail" for result in results):
        raise click.exceptions.Exit(int(ExitCode.HOST))


def _plan_result(fits: bool | None, viable: bool | None, reasons: tuple[str, ...]) -> Result:
    bad = fits is False or viable is False
    return Result(
        name="plan",
        status="fail" if bad else "ok",
        actual="does not fit" if fits is False else "not viable" if viable is False else "fits",
        evidence="; ".join(reasons) if bad else None,
        remedy="stackctl plan PROFILE shows what helps" if bad else None,
    )
