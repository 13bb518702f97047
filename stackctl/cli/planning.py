"""Planning for the verbs: facts of this machine or of a file, and what would help instead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stackctl.errors import ExitCode, StackctlError

if TYPE_CHECKING:
    from stackctl.cli.session import Session
    from stackctl.values.claim import Claim
    from stackctl.values.host import Host
    from stackctl.values.measured import Calibration, EngineFacts, Seen
    from stackctl.values.model import Model
    from stackctl.values.plan import Plan
    from stackctl.values.profile import Profile


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from; ``door`` is the image of its front door, if it has one.

    ``passed`` is what it does not count that other users claim, in words.
    """

    plan: Plan
    facts: EngineFacts | None
    host: Host
    door: str | None = None
    passed: str | None = None


@dataclass(frozen=True)
class _Basis:
    """The machine that is planned for."""

    session: Session
    host: Host
    claims: tuple[Claim, ...]
    binding: tuple[Claim, ...]
    calibrations: tuple[Calibration, ...]
    live: bool


def make_plan(session: Session, profile: Profile, facts: Path | None) -> Planned:
    """Plan without touching anything. When the plan is no good, its verdict says what is."""
    basis = _basis(session, facts)
    planned = _plan(basis, profile, _known(session, profile))
    if planned.passed:
        session.out.warn(planned.passed)
    return dataclasses.replace(planned, plan=_advised(basis, profile, planned.plan))


def _known(session: Session, profile: Profile) -> Model | None:
    """A model that is not here, as its hub tells of it; None leaves it to the plan."""
    from stackctl.machine.transfer import Lost
    from stackctl.sources.hubcache import NotHere, parse_remote
    from stackctl.sources.models import read_model
    from stackctl.store import hub
    from stackctl.store.facts import read_remote

    if profile.model is None:
        return None
    try:
        return read_model(profile.model)
    except NotHere:
        parsed = parse_remote(profile.model)
        if parsed is None or parsed.url is not None or hub.offline():
            raise
        session.out.progress("model", f"asking for {profile.model}")
        with contextlib.suppress(Lost):
            return read_remote(profile.model, parsed, session.paths().cache)
        raise


def plan_for(session: Session, name: str, model: Model) -> Plan:
    """The plan of a profile for a model of which facts are known, on this machine."""
    from stackctl.values.profile import Overrides

    own = session.profiles().resolve(name, Overrides())
    profile = msgspec.structs.replace(own, model=model.source, served_name=None)
    return _plan(_here(session), profile, model).plan


def advised(session: Session, profile: Profile, plan: Plan) -> Plan:
    """A plan for this machine; when it is no good, its verdict says what is."""
    return _advised(_basis(session, None), profile, plan)


def _advised(basis: _Basis, profile: Profile, plan: Plan) -> Plan:
    from stackctl.plan.verdict import advise

    if plan.verdict.fits is not False and plan.verdict.viable is not False:
        return plan
    candidates, moved = _candidates(basis, plan)
    verdict = advise(plan, profile, candidates, moved)
    return msgspec.structs.replace(plan, verdict=verdict)


@functools.cache
def _here(session: Session) -> _Basis:
    """This machine, looked at once."""
    return _basis(session, None)


def read_host(session: Session, facts: Path | None) -> Host:
    """The machine that is planned for: this one, or the one in a file."""
    return _basis(session, facts).host


def _basis(session: Session, facts: Path | None) -> _Basis:
    from stackctl.values.base import from_json
    from stackctl.values.host import Host

    if facts is not None:
        try:
            text = facts.read_bytes()
        except OSError as error:
            raise StackctlError(
                f"cannot read {facts}: {error.strerror}", exit_code=ExitCode.USAGE
            ) from None
        return _Basis(session, from_json(text, Host, where=str(facts)), (), (), (), live=False)
    from stackctl.machine.files import LiveMachine
    from stackctl.probe import probe
    from stackctl.state import calibrations, claims

    machine, paths = LiveMachine(), session.paths()
    return _Basis(
        session,
        probe(machine, scope=session.scope),
        claims.declared(machine, paths),
        claims.binding(machine, paths),
        calibrations.read(paths.state),
        live=True,
    )


def _plan(basis: _Basis, profile: Profile, model: Model | None = None) -> Planned:
    from stackctl.deploy.images import known_door, known_image, usual_image
    from stackctl.deploy.preflight import require_model
    from stackctl.engines import engine
    from stackctl.plan.outvoted import solve_past, told
    from stackctl.plan.solve import Known
    from stackctl.sources.models import read_model
    from stackctl.state import seen
    from stackctl.state.enginefacts import EngineFactsCache
    from stackctl.state.generations import Generations

    model = model or read_model(require_model(profile))
    found: EngineFacts | None = None
    door, why_door = None, None
    earlier: tuple[Seen, ...] = ()
    if basis.live:
        door, why_door = known_door(profile)
        cache = EngineFactsCache(basis.session.paths().cache)
        image, reason, found = known_image(profile, engine(profile.engine), cache)
        if found is not None:
            store = Generations(basis.session.paths().state)
            earlier = seen.read(store, profile.stack, model, found.image_id)
    elif profile.image is not None:
        image, reason = profile.image, "this image was asked for"
    else:
        image, reason = usual_image(profile, engine(profile.engine)), "not looked at"
    known = Known(
        image=image,
        image_reason=reason,
        facts=found,
        seen=earlier,
        claims=basis.claims,
        calibrations=basis.calibrations,
        door_reason=why_door,
        engine_port=None if door is None else _engine_port(basis, profile),
    )
    plan, used = solve_past(
        host=basis.host, model=model, profile=profile, known=known, binding=basis.binding
    )
    return Planned(plan, found, basis.host, door, told(profile.stack, known, used))


def _engine_port(basis: _Basis, profile: Profile) -> int:
    """The engine's port behind its door: the one it has, or the next one that is free."""
    from stackctl.deploy.takeover import private_port
    from stackctl.machine.files import LiveMachine
    from stackctl.state.generations import Generations

    own = (claim.engine_port for claim in basis.claims if claim.stack == profile.stack)
    store = Generations(basis.session.paths().state)
    return next(filter(None, own), None) or private_port(
        LiveMachine(), store, profile, basis.claims
    )


def _candidates(basis: _Basis, refused: Plan) -> tuple[list[Plan], list[str]]:
    """Plans of all profiles that name a model, for this machine, and the names of those that take
    the refused plan's model instead of their own: the first remedy is the same model on a GPU."""
    from stackctl.plan.verdict import good_enough
    from stackctl.values.profile import Overrides

    profiles = basis.session.profiles()
    plans, moved = [], []
    for name in profiles.names():
        try:
            own = profiles.resolve(name, Overrides())
            wish = own.placement
            on_gpu = own.engine == refused.engine == "llama.cpp" and wish.gpus is not None
            suits = wish.cpu_experts is None or refused.model.experts
            if on_gpu and suits and own.model != refused.model.source:
                same = msgspec.structs.replace(own, model=refused.model.source, served_name=None)
                if good_enough(plan := _plan(basis, same, refused.model).plan):
                    plans.append(plan)
                    moved.append(name)
                    continue
            if own.model is not None:
                plans.append(_plan(basis, own).plan)
        except StackctlError:
            continue  # it cannot run here, so it is no advice
    return plans, moved
