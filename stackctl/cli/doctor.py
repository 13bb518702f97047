"""``stackctl doctor``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import facts_option, plan_options, profile_names
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.host import Host
from stackctl.values.plan import Plan, Verdict
from stackctl.values.profile import Overrides, Profile
from stackctl.values.result import Result

if TYPE_CHECKING:
    from stackctl.deploy.planning import PlanBasis
    from stackctl.sources.profiles import Profiles


@stackctl_command("doctor")
@click.argument("profile", required=False, shell_complete=profile_names)
@plan_options
@facts_option
def command(session: Session, profile: str | None, asked: Overrides, facts: Path | None) -> None:
    """Find the obstacles on this host to PROFILE; without PROFILE, to stacks in general.

    Each finding comes with the command that fixes it. Exits 6 when something must be fixed first,
    else 0: warnings do not count.
    """
    from stackctl.probe.doctor import findings
    from stackctl.values.result import DoctorReport

    basis = session.plan_basis(facts)
    if profile is None:
        results = list(findings(basis.host))
    else:
        profiles = session.profiles()
        wanted = profiles.resolve(profile, asked)
        results = _profile_findings(
            session, basis, profiles, wanted, live=facts is None, again=_again(profile)
        )
    order = {"fail": 0, "warn": 1, "ok": 2, "info": 3, "skip": 4}
    results.sort(key=lambda result: order[result.status])
    if not session.out.wrote_json(DoctorReport(profile=profile, results=tuple(results))):
        session.out.results(results)
    if any(result.status == "fail" for result in results):
        raise click.exceptions.Exit(int(ExitCode.HOST))


def _profile_findings(
    session: Session,
    basis: PlanBasis,
    profiles: Profiles,
    wanted: Profile,
    *,
    live: bool,
    again: str,
) -> list[Result]:
    """Return the findings for a profile: of its plan, of its GPUs, and of the host for its needs.

    Args:
        session: prints the progress of the plan.
        basis: the inputs of the plan.
        profiles: where the profile comes from.
        wanted: the resolved profile.
        live: the host is this machine, so that images can be inspected and containers tried.
        again: the command that shows the plan.
    """
    from stackctl.deploy.planning import preview
    from stackctl.engines import uses_gpu
    from stackctl.machine.podman import image_cuda
    from stackctl.probe.doctor import findings
    from stackctl.provision.items import binds_cpus
    from stackctl.requirements.gpu import DEFAULT_CUDA

    results: list[Result] = []
    on_gpu = uses_gpu(wanted)
    cpuset = binds_cpus(wanted)
    # The CUDA version of a profile's own image is unknown until the image is here.
    cuda = DEFAULT_CUDA if wanted.image is None else None
    weights: int | None = None
    nvfp4: bool | None = None
    try:
        plan = preview(basis, profiles, wanted, session.out).plan
        nvfp4 = plan.model.is_nvfp4
        if on_gpu and live:
            cuda = image_cuda(plan.image) or cuda
        weights = None if on_gpu else plan.model.weights_bytes
        cpuset = cpuset or plan.placement.policy == "interleave"
        results.append(_plan_result(plan.verdict, again))
        if plan.placement.gpus and live:
            results.append(_proof(plan, basis.host))
    except StackctlError as error:
        results.append(Result(name="plan", status="fail", actual=error.message, remedy=error.hint))
    results += findings(
        basis.host,
        memlock_bytes=weights,
        needs_cpuset=cpuset,
        needs_gpu=on_gpu,
        nvfp4=nvfp4,
        cuda=cuda,
    )
    return results


def _proof(plan: Plan, host: Host) -> Result:
    """Check that Podman can make a container with the GPUs; skip the check without the image."""
    from stackctl.deploy import gpu_access
    from stackctl.machine import podman

    expected = "podman makes a container with the GPU"
    if not podman.image_exists(plan.image):
        return Result(
            name="gpu-proof", status="skip", expected=expected,
            actual="not tried: the image is not here",
            remedy=f"podman pull {plan.image}",
        )  # fmt: skip
    try:
        gpu_access.test_gpu_container(plan.image, gpu_access.planned_gpus(host, plan), host)
    except StackctlError as error:
        return Result(
            name="gpu-proof", status="fail", expected=expected, actual=error.message,
            evidence=" ".join(error.details) or None, remedy=error.hint,
        )  # fmt: skip
    return Result(name="gpu-proof", status="ok", expected=expected, actual="it does")


def _plan_result(verdict: Verdict, plan: str) -> Result:
    bad = verdict.fits is False or verdict.viable is False
    wrong = "does not fit" if verdict.fits is False else "not viable"
    return Result(
        name="plan",
        status="fail" if bad else "ok",
        actual=f"{wrong}: the plan says what helps" if bad else "fits",
        evidence="; ".join(verdict.reasons) if bad else None,
        remedy=plan if bad else None,
    )


def _again(profile: str) -> str:
    """Return the command that shows the plan, with the options of the present command."""
    given = click.get_current_context()
    words = ["stackctl", "plan", profile]
    for option in given.command.params:
        value = given.params.get(option.name or "")
        if isinstance(option, click.Option) and value and not option.is_flag:
            for one in value if option.multiple else (value,):
                words += [option.opts[0], str(one)]
    return shlex.join(words)
