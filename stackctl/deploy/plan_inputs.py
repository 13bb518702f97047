"""The inputs of the planner, assembled in one place for every command that plans."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from stackctl.deploy.images import PlannedImage
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.machine import Machine
from stackctl.plan import claimed_resources
from stackctl.plan.placement import choose_placement
from stackctl.plan.planner import PlanInputs
from stackctl.probe import probe
from stackctl.state import calibrations, claims, engine_workarounds, measured_memory
from stackctl.state.generations import Generations
from stackctl.state.paths import Paths
from stackctl.values.base import from_json
from stackctl.values.calibration import Calibration
from stackctl.values.claim import Claim
from stackctl.values.engine_facts import EngineWorkaround, MeasuredMemory
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.profile import Profile


@dataclass(frozen=True)
class PlanBasis:
    """The machine that plans are made for, with its records of stacks and speeds.

    ``claims`` are the claims of all stacks whose units can be read, ``binding`` the claims among
    them that a plan of this user must respect. ``live`` is False for a machine from a file of
    facts: its records are unknown, and this machine is not read.
    """

    paths: Paths
    machine: Machine
    host: Host
    claims: tuple[Claim, ...] = ()
    binding: tuple[Claim, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    live: bool = True

    @property
    def generations(self) -> Generations:
        """Return the stored generations of the scope."""
        return Generations(self.paths.state)


def read_basis(paths: Paths, machine: Machine) -> PlanBasis:
    """Probe this machine and read its records."""
    return PlanBasis(
        paths=paths,
        machine=machine,
        host=probe(machine, scope=paths.scope),
        claims=claims.installed_claims(machine, paths),
        binding=claims.enforceable_claims(machine, paths),
        calibrations=calibrations.read(paths.state),
    )


def read_basis_file(paths: Paths, machine: Machine, facts: Path) -> PlanBasis:
    """Read the facts of a machine from a file in the form of ``stackctl probe --json``.

    Raises:
        StackctlError: exit 2 for a file that cannot be read or is not valid.
    """
    try:
        text = facts.read_bytes()
    except OSError as error:
        raise StackctlError(
            f"cannot read {facts}: {error.strerror}", exit_code=ExitCode.USAGE
        ) from None
    return PlanBasis(paths, machine, from_json(text, Host, where=str(facts)), live=False)


def inputs_before_image(
    basis: PlanBasis, profile: Profile, model: Model, *, deadline_s: float | None = None
) -> PlanInputs:
    """Return the inputs of a plan whose image is not known yet.

    The plan then uses the options of the newest known dialect, and the memory that earlier starts
    of the model have shown with any image.
    """
    measured = measured_memory.read(basis.generations, profile.stack, model) if basis.live else ()
    return PlanInputs(
        image="",
        image_reason="",
        claims=basis.claims,
        calibrations=basis.calibrations,
        measured_memory=measured,
        deadline_s=deadline_s,
    )


def with_image(
    basis: PlanBasis,
    inputs: PlanInputs,
    profile: Profile,
    model: Model,
    image: PlannedImage,
    *,
    lesson: EngineWorkaround | None = None,
) -> PlanInputs:
    """Return the inputs with an image, and with the records of earlier starts of that image.

    Args:
        basis: the machine.
        inputs: the inputs without an image.
        profile: the profile that is planned.
        model: the profile's model.
        image: the image; without its facts no records of earlier starts are used.
        lesson: options that help after a start that has just failed; None reads the stored ones.

    Raises:
        StackctlError: exit 2 or 6 for a placement that the machine cannot have.
    """
    measured: tuple[MeasuredMemory, ...] = ()
    if image.facts is not None and basis.live:
        image_id = image.facts.image_id
        measured = measured_memory.read(basis.generations, profile.stack, model, image_id)
        if lesson is None:
            lesson = _learned(basis, inputs, profile, image_id)
    return dataclasses.replace(
        inputs,
        image=image.reference,
        image_reason=image.reason,
        facts=image.facts,
        measured_memory=measured,
        workaround=lesson,
    )


def _learned(
    basis: PlanBasis, inputs: PlanInputs, profile: Profile, image_id: str
) -> EngineWorkaround | None:
    """Return the stored options that the image needed on the GPU that the stack will get."""
    gpus = choose_placement(
        basis.host, profile, claimed_resources.other_claims(inputs.claims, profile.stack)
    ).gpus
    return engine_workarounds.read(basis.paths.state, image_id, *(gpu.name for gpu in gpus[:1]))
