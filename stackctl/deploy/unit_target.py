"""The target for the units of a plan, the same for a deployment and for ``render``."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.deploy import gpu_access
from stackctl.engines import engine as find_engine
from stackctl.engines.protocol import Engine
from stackctl.plan.claimed_resources import claim_of
from stackctl.state.paths import Paths
from stackctl.units.render import UnitTarget
from stackctl.values.engine_facts import EngineFacts
from stackctl.values.host import Host
from stackctl.values.plan import Plan


def unit_target(paths: Paths, host: Host, plan: Plan, facts: EngineFacts | None) -> UnitTarget:
    """Return the target for the units of a plan.

    Args:
        paths: folders of the scope that the units belong to.
        host: the machine; its Podman decides which keys a unit may use.
        plan: the plan; the unit runs its image.
        facts: the facts of that image. With None the image is assumed to start as published images
            or images built here do, and ``IMAGE`` stands for its id in the path of the cache.
    """
    if facts is not None:
        program, entrypoint, image_id = facts.program, facts.entrypoint, facts.image_id
    else:
        program, entrypoint = _assumed_start(find_engine(plan.engine), plan.image)
        image_id = "IMAGE"
    return UnitTarget(
        scope=paths.scope,
        podman=host.tools.podman,
        image=plan.image,
        program=program,
        entrypoint=entrypoint,
        claim=claim_of(plan),
        devices=gpu_access.cdi_names(gpu_access.planned_gpus(host, plan)),
        cache=str(paths.compile_cache(image_id)),
    )


def start_command(engine: Engine, entrypoint: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the words before the engine's arguments, and the entry point to set (None: none).

    An entry point of several words, such as "PROGRAM serve", holds a part of the arguments, so its
    first word replaces it.
    """
    if not entrypoint:
        return (engine.program,), None
    return (), entrypoint[0] if len(entrypoint) > 1 else None


def _assumed_start(engine: Engine, image: str) -> tuple[tuple[str, ...], str | None]:
    """Return ``start_command`` of an image without facts: one built here has no entry point."""
    local = image in (engine.local_image, engine.cpu_image)
    return start_command(engine, () if local else engine.published_entrypoint)
