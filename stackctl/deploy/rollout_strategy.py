"""The takeover from an old generation: slot, order of stop and start, ports and memory."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.deploy import preflight, proxy
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import InstalledStack
from stackctl.engines import engine as find_engine
from stackctl.errors import StackctlError
from stackctl.plan import claimed_resources, memory
from stackctl.plan.claimed_resources import claim_of
from stackctl.plan.plan_diff import changed_decisions
from stackctl.quantity import format_bytes, format_duration
from stackctl.state import claims
from stackctl.units import render
from stackctl.values.claim import Claim
from stackctl.values.generation import SIDE_BY_SIDE, Generation
from stackctl.values.host import Host
from stackctl.values.plan import Decision, Plan, Scalar


def free_slot(stack: str, unit: str | None) -> str:
    """Return the name of the free slot of a stack."""
    return next(name for name in render.engine_unit_names(stack) if name != unit)


def is_unchanged(new: Generation, before: InstalledStack) -> bool:
    """Return True if a generation has the same unit and front door as the installed one.

    Number, slot, time limits and claimed memory may differ, and comments, which another version of
    stackctl words differently. In a file that was changed by hand comments count.
    """
    old = before.generation
    if old is None or before.file is None:
        return False
    (file,) = new.units.files
    texts = [
        render.without_claimed_bytes(render.comparison_text(text))
        for text in (file.text, before.file.text)
    ]
    if before.file.text in (stored.text for stored in old.units.files):
        texts = [render.without_comments(text) for text in texts]
    return texts[0] == texts[1] and new.door == old.door


def choose_strategy(
    context: Context, new: Generation, before: InstalledStack, host: Host
) -> Decision | None:
    """Return the decision to run both side by side or to stop the old one first.

    Side by side needs front doors on both, and memory for both engines at once. None if no old
    engine runs.
    """
    old = before.generation
    if old is None or before.is_stopped:
        return None
    if old.door is None or new.door is None:
        why = "no front door: requests fail meanwhile"
        return _decision("stop first", why)
    if old.plan.engine_listen_port == new.plan.engine_listen_port:
        # A rollback keeps its port, so it may get the port of the generation that is installed.
        return _decision("stop first", f"both want port {new.plan.engine_listen_port}")
    declared = (*claimed_resources.other_claims(claims.installed_claims(context.machine,
                context.paths), new.stack),
                claim_of(old.plan))  # fmt: skip
    for need, limit in _needs(new.plan, host, declared):
        if limit is None or need > limit:
            left = "unknown" if limit is None else format_bytes(max(0, limit))
            why = f"both do not fit: {format_bytes(need)} more, {left} left beside the old one"
            return _decision("stop first", why)
    available = host.memory.available_bytes
    if available is not None and not new.plan.placement.gpus:
        need = new.plan.memory.total_bytes
        if need > available:
            why = f"both do not fit: {format_bytes(need)} more, {format_bytes(available)} free now"
            return _decision("stop first", why)
    return _decision(SIDE_BY_SIDE, "both fit: the new one answers before the old one stops")


def _decision(value: str, reason: str) -> Decision:
    return Decision(field="takeover", value=value, reason=reason, source="derived")


def _needs(plan: Plan, host: Host, declared: Sequence[Claim]) -> list[tuple[int, int | None]]:
    """Return the bytes that a plan needs of each pool, and the limit that other claims leave."""
    main = memory.memory_limit(host, plan.placement, declared).bytes
    if not plan.placement.gpus:
        return [(plan.memory.total_bytes, main)]
    gpus = [gpu for gpu in host.gpus if str(gpu.index) in plan.placement.gpus]
    on_gpu = memory.gpu_limit(gpus, 0, declared).bytes if gpus else None
    beside = plan.host_memory.total_bytes if plan.host_memory else 0
    return [(plan.memory.total_bytes, on_gpu), (beside, main)]


def require_room(
    context: Context, host: Host, new: Generation, before: InstalledStack, *, force: bool
) -> None:
    """Check that ports and memory are free; those that the old engine gives up count as free.

    Raises:
        StackctlError: exit 1 for a taken port, exit 5 for memory.
    """
    old = before.generation if not before.is_stopped else None
    held = {old.plan.port, old.plan.engine_port} if old else set()
    if before.is_stopped and proxy.is_installed(context, new.stack):
        held.add(before.generation.plan.port if before.generation else None)
    others = claimed_resources.other_claims(
        claims.installed_claims(context.machine, context.paths), new.stack
    )
    binding = claimed_resources.other_claims(
        claims.enforceable_claims(context.machine, context.paths), new.stack
    )
    kept = None
    if new.operation == "rollback":
        kept = f"a rollback keeps its ports: stop that, or stackctl up {new.plan.profile}"
    for port in (new.plan.port, new.plan.engine_port):
        if port is None or port in held:
            continue
        preflight.require_port(context.machine, port, kept)
        if owner := claimed_resources.port_owner(binding, port):
            raise StackctlError(
                f"port {port} belongs to {owner}",
                hint=kept or f"another port: --set port={port + 1}, or stackctl down {owner}",
            )
        if owner := claimed_resources.port_owner(others, port):
            context.progress.warn(f"port {port} is claimed by {owner[:40]}, a stack of a user")
    if not force:
        gone = None if old is None or new.side_by_side else old.plan
        preflight.require_free_memory(host, new.plan, gone)


def show_changes(context: Context, old: Generation, new: Generation) -> None:
    """Report the changes of the plan, and their effect on requests."""
    # Clients use the profile's port; the engine's private port is of no interest.
    hidden = {"start-deadline"}
    if old.plan.port == new.plan.port:
        hidden |= {find_engine(one.plan.engine).port_option for one in (old, new)}
    changes = changed_decisions(old.plan, new.plan)
    rows = [(c.field, _shown(c.before), _shown(c.after)) for c in changes if c.field not in hidden]
    rows = [row for row in rows if row[1] != row[2]]
    notes = []
    if not rows:
        notes.append("the plan is the same: its unit was changed, or does not answer")
    if new.strategy is not None:
        text = f"{new.strategy.value}: {new.strategy.reason}"
        if not new.side_by_side and old.outcome.ready_s is not None:
            text += f"; about {format_duration(old.outcome.ready_s)}"
        notes.append(text)
        if not new.side_by_side and new.door is not None and old.door is not None:
            notes.append(
                "the front door holds new requests meanwhile "
                f"(at most {format_duration(new.door.hold_s)})"
            )
    title = f"{new.stack}: {_title(old)} -> {_title(new)}"
    context.progress.changes(title, rows, notes)


def _shown(value: Scalar) -> str:
    return "(unset)" if value is None else str(value)


def _title(generation: Generation) -> str:
    plan = generation.plan
    return f"{plan.profile} ({plan.objective}, {plan.served_name})"
