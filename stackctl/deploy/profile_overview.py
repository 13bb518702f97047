"""All profiles as they would run on a machine, and the best of them. No network, no images."""

from __future__ import annotations

import msgspec

from stackctl.deploy.planning import PlanBasis, inputs_before_image
from stackctl.engines import engine as find_engine
from stackctl.engines import uses_gpu
from stackctl.errors import StackctlError
from stackctl.plan.planner import make_plan_ignoring_user_claims
from stackctl.plan.verdict import format_range, is_refused, refusal
from stackctl.quantity import format_bytes
from stackctl.sources.catalogue import find_download, replacement_advice
from stackctl.sources.hub_cache import ModelNotCached, parse_remote
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.values.model import Model
from stackctl.values.profile import Overrides, Profile
from stackctl.values.profile_list import ProfileList, ProfileSummary


def profile_overview(basis: PlanBasis, profiles: Profiles) -> ProfileList:
    """Plan all profiles for a machine, in the order of their names, and mark the best.

    The best profile is known to fit and to be viable, its model is here or can be fetched, and its
    image need not be built first. Profiles that promise and meet a time to the first token come
    before others, then those for latency, those on a GPU, and those with the largest model, because
    more parameters answer better. Of equals the first is the best.
    """
    found = []
    best: tuple[tuple[bool, bool, bool, int], int] | None = None
    for number, name in enumerate(profiles.names()):
        try:
            profile = profiles.resolve(name, Overrides())
        except StackctlError as error:
            text = f"not valid: {error.message}"
            found.append(ProfileSummary(name=name, stack="-", objective="-", description=text))
            continue
        one = _summary(basis, profile)
        found.append(one)
        if _can_start(profile, one):
            interactive, latency = one.ttft_slo_s is not None, one.objective == "latency"
            rank = (interactive, latency, bool(one.on_gpu), one.parameters or 0)
            if best is None or rank > best[0]:
                best = (rank, number)
    if best is not None:
        found[best[1]] = msgspec.structs.replace(found[best[1]], recommended=True)
    return ProfileList(profiles=tuple(found))


def reasons(one: ProfileSummary) -> list[str]:
    """Return the reasons for a recommended profile: memory, speed, model and rank, one a line."""
    fits = f"fits: {format_bytes(one.memory_bytes or 0)}"
    if one.limit_bytes is not None:
        fits += f" of {format_bytes(one.limit_bytes)}, {one.pool}"
    speeds = []
    if one.decode_tok_s is not None:
        speeds.append(f"{format_range(one.decode_tok_s)} tok/s")
    if one.ttft_s is not None and one.ttft_s.range is not None:
        tokens = f"{one.ttft_s.prompt_tokens:,} tokens"
        speeds.append(f"first token {format_range(one.ttft_s.range)} s at {tokens}")
    model = one.model or ""
    if one.download_bytes:
        model += f", {format_bytes(one.download_bytes)} to download"
    return [
        fits,
        *([f"expected: {', '.join(speeds)}"] if speeds else []),
        f"model: {model}",
        f"why: {_advantage(one)}",
    ]


def _advantage(one: ProfileSummary) -> str:
    """Return the reason why a recommended profile ranks before the others that can start."""
    where = " on a GPU" if one.on_gpu else ""
    if one.ttft_slo_s is not None:
        return (
            f"first token within its {one.ttft_slo_s:g} s; largest such model{where} that can start"
        )
    if one.objective == "latency":
        return f"no first-token SLO is met; largest{where} for latency that can start"
    return f"none for latency can start; largest model{where} for throughput"


def _can_start(profile: Profile, one: ProfileSummary) -> bool:
    """Return True if ``up`` with only the profile's name is known to start a viable stack."""
    has_model = one.download_bytes == 0 or one.fetched_from is not None
    must_be_built = profile.forces_cpu and find_engine(profile.engine).cpu_image is not None
    return one.fits is True and one.viable is True and has_model and not must_be_built


def _summary(basis: PlanBasis, profile: Profile) -> ProfileSummary:
    summary = ProfileSummary(
        name=profile.name,
        stack=profile.stack,
        objective=profile.objective,
        description=profile.description or "",
        engine=profile.engine,
        model=profile.model,
        on_gpu=uses_gpu(profile),
        ttft_slo_s=profile.slo.ttft_s,
    )
    if profile.model is None:
        return msgspec.structs.replace(summary, reason="it names no model: --model SOURCE")
    try:
        model = read_model(profile.model)
    except ModelNotCached:
        # The hub knows its facts, but it is not asked here.
        return msgspec.structs.replace(summary, fetched_from=profile.model)
    except StackctlError as error:
        return msgspec.structs.replace(summary, reason=error.message)
    return _planned(basis, profile, model, _with_download(summary, profile.model, model))


def _with_download(summary: ProfileSummary, source: str, model: Model) -> ProfileSummary:
    """Return a summary with the place and the size of its model's download."""
    if model.files:
        return msgspec.structs.replace(summary, fetched_from=None, download_bytes=0)
    if (download := find_download(source)) is not None:
        size = download.bytes or model.weights_bytes
        return msgspec.structs.replace(summary, fetched_from=download.source, download_bytes=size)
    if parse_remote(source) is None or replacement_advice(source) is not None:
        return summary
    return msgspec.structs.replace(summary, fetched_from=source, download_bytes=model.weights_bytes)


def _planned(
    basis: PlanBasis, profile: Profile, model: Model, summary: ProfileSummary
) -> ProfileSummary:
    """Return a summary with the results of a plan."""
    summary = msgspec.structs.replace(summary, parameters=model.parameters)
    try:
        plan, _ = make_plan_ignoring_user_claims(
            host=basis.host,
            model=model,
            profile=profile,
            inputs=inputs_before_image(basis, profile, model),
            binding=basis.binding,
        )
    except StackctlError as error:
        return msgspec.structs.replace(summary, fits=False, reason=error.message)
    return msgspec.structs.replace(
        summary,
        on_gpu=bool(plan.placement.gpus),
        fits=plan.verdict.fits,
        viable=plan.verdict.viable,
        reason=refusal(plan)[0] if is_refused(plan) else None,
        decode_tok_s=plan.prediction.decode_tok_s,
        ttft_s=plan.prediction.ttft_s,
        pool=plan.memory.pool,
        memory_bytes=plan.memory.total_bytes,
        limit_bytes=plan.memory.limit_bytes,
    )
