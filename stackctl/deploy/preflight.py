"""Checks before a change, and the way from the old engine to the new one.

Tools, model files, ports and memory are checked. The way is the free slot, the free port, and the
order of stop and start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import InstalledStack
from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ports
from stackctl.machine.machine import Machine
from stackctl.plan import memory
from stackctl.plan.claimed_resources import claim_of, other_claims, port_owner
from stackctl.plan.plan_diff import changed_decisions
from stackctl.quantity import format_bytes, format_duration
from stackctl.requirements.gpu import gpu_memory_users
from stackctl.requirements.systemd import KERNEL_ARGUMENT
from stackctl.sources.catalogue import find_download, replacement_advice
from stackctl.state import claims
from stackctl.state.generations import Generations
from stackctl.units import render
from stackctl.units.quadlet import PODMAN_REMEDY, parse_version
from stackctl.values.generation import SIDE_BY_SIDE, Generation
from stackctl.values.host import Host
from stackctl.values.model import Model, ModelFormat
from stackctl.values.plan import Claim, Decision, Plan, Scalar
from stackctl.values.profile import Profile

#: Ports of engines behind front doors, below the range that Linux gives to outgoing connections by
#: default.
_FIRST_PORT, _LAST_PORT = 20000, 32000


def require_tools(host: Host) -> str:
    """Check that Podman, its Quadlet generator and cgroup v2 are there.

    Returns:
        The path of the Quadlet generator.

    Raises:
        StackctlError: exit 6 with the missing tool and the remedy.
    """
    tools = host.tools
    if tools.podman is None:
        silent = next((p for p in host.problems if p.code == "podman-no-answer"), None)
        if silent is not None:
            raise _lacks(silent.what, "podman --version shows what is wrong", silent.why)
        raise _lacks("podman is not installed", PODMAN_REMEDY)
    parse_version(tools.podman)
    if tools.quadlet_generator is None:
        raise _lacks(
            f"Podman {tools.podman} is here, but not its Quadlet generator",
            "reinstall the distribution's podman package",
        )
    if tools.cgroup_version != 2:
        raise _lacks(
            "this machine runs cgroup v1 or the hybrid layout; Quadlet needs cgroup v2",
            f"boot with the kernel argument {KERNEL_ARGUMENT}",
        )
    return tools.quadlet_generator


def require_model(profile: Profile) -> str:
    """Return the profile's model source. Raise StackctlError (exit 2) if it names no model."""
    if profile.model is None:
        option = _here(find_engine(profile.engine).model_format)
        raise StackctlError(
            f"profile {profile.name} names no model",
            hint=f"{option}, or the key model in the profile",
            exit_code=ExitCode.USAGE,
        )
    return profile.model


def require_files(model: Model) -> None:
    """Check that a model's files are on this machine, where its container sees them.

    Raises:
        StackctlError: exit 1 if only facts are known, or if a file lies outside the model's folder.
    """
    if lost := model_mounts.file_outside_mounts(model, _all_files(model)):
        raise StackctlError(
            f"{lost} is a file of the model, and lies outside of its folder {model.folder}",
            hint="the engine sees the folder only: put the file itself there, not a link to it",
        )
    if model.files:
        return
    raise StackctlError(
        f"{model.source}: the model is not on this machine, only facts about it",
        hint=_way_to_files(model),
    )


def _way_to_files(model: Model) -> str:
    """Return the hint for a model without files: its download, else a model in its place."""
    download = find_download(model.source)
    if download is not None:
        return f"stackctl model fetch {download.source}"
    if (advice := replacement_advice(model.source)) is not None:
        return advice
    return (
        f"{_here(model.format)}, or --model hf:ORG/REPO, which is fetched; "
        "stackctl plan works without the files"
    )


def _here(model_format: ModelFormat) -> str:
    """Return the option that names a local model, as an example."""
    if model_format == "safetensors":
        return "--model dir:/path/to/folder"
    return "--model file:/path/to/model.gguf"


def _all_files(model: Model) -> list[str]:
    """Return the real paths of all files in a checkpoint's folder; none for other models."""
    if model.folder is None:
        return []
    try:
        beside = [path.resolve() for path in Path(model.folder).iterdir() if path.is_file()]
    except OSError as error:
        raise StackctlError(f"cannot read {model.folder}: {error.strerror or error}") from None
    return sorted({*(file.path for file in model.files), *map(str, beside)})


def require_port(machine: Machine, port: int, remedy: str | None = None) -> None:
    """Raise StackctlError (exit 1) with the process that listens on a port, if there is one.

    ``remedy`` is the hint if another port is no help.
    """
    if owner := ports.listener(machine, port):
        raise StackctlError(
            f"port {port} is taken by {owner}",
            hint=remedy or f"stop it, or another port: --set port={port + 1}",
        )


def require_free_memory(host: Host, plan: Plan, old: Plan | None) -> None:
    """Raise StackctlError (exit 5) if main memory or a GPU has less free memory than a plan needs.

    The memory of the running plan that is stopped first (``old``) counts as free.
    """
    main, gpus = _needs(plan)
    held_main, held_gpus = _needs(old) if old is not None else (0, {})
    pools = [
        ("memory", main, host.memory.available_bytes, held_main,
         "ps --sort=-rss -eo pid,rss,comm lists them"),
        *((f"GPU {gpu.index}", gpus.get(str(gpu.index), 0), gpu.free_bytes,
           held_gpus.get(str(gpu.index), 0), gpu_memory_users(gpu) or "nvidia-smi lists them")
          for gpu in host.gpus),
    ]  # fmt: skip
    for pool, need, free, held, how in pools:
        if free is not None and need > free + held:
            needs, left = format_bytes(need), format_bytes(free + held)
            raise StackctlError(
                f"{plan.stack} needs {needs} of {pool}, {left} is available now",
                hint=f"end the processes that use it ({how}), or --force starts it anyway",
                exit_code=ExitCode.REFUSED,
            )


def _needs(plan: Plan) -> tuple[int, dict[str, int]]:
    """Return the bytes that a plan needs of main memory, and of each GPU by its index."""
    if not plan.placement.gpus:
        return plan.memory.total_bytes, {}
    main = plan.host_memory.total_bytes if plan.host_memory is not None else 0
    return main, dict.fromkeys(plan.placement.gpus, plan.memory.total_bytes)


def _lacks(message: str, hint: str, *details: str) -> StackctlError:
    return StackctlError(message, hint=hint, details=details, exit_code=ExitCode.HOST)


def allocate_engine_port(
    machine: Machine, store: Generations, profile: Profile, declared: Sequence[Claim]
) -> int:
    """Return a port that nothing uses or claims, for an engine behind a front door.

    Ports of stored generations are left out, so that a rollback finds its own port free.

    Raises:
        StackctlError: every port of the range is taken.
    """
    taken = {port for claim in declared for port in (claim.port, claim.engine_port)}
    for stack in store.stacks():
        for number in store.numbers(stack):
            # Nobody can roll back to a damaged generation, so its port is not kept.
            with contextlib.suppress(StackctlError):
                taken.add(store.read(stack, number).plan.engine_port)
    taken |= ports.reserved_ports(machine)
    span = _LAST_PORT - _FIRST_PORT
    # Different users begin at different ports, in case they choose at the same moment.
    start = ((profile.port or 8080) + 1009 * os.getuid()) % span
    found = [_FIRST_PORT + (start + step) % span for step in range(span)]
    found = [port for port in found if port not in taken]
    # Ports of the range for outgoing connections come last: a connection may take such a port while
    # the engine is down.
    risky = ports.ephemeral_ports(machine)
    for port in sorted(found, key=lambda port: port in risky):
        if ports.listener(machine, port) is None:
            return port
    raise StackctlError(
        f"no free port between {_FIRST_PORT} and {_LAST_PORT} for the engine",
        hint="stackctl prune STACK forgets old generations",
    )


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
    obstacle = _obstacle_to_both(context, new, old, host)
    value = "stop first" if obstacle else SIDE_BY_SIDE
    reason = obstacle or "both fit: the new one answers before the old one stops"
    return Decision(field="takeover", value=value, reason=reason, source="derived")


def _obstacle_to_both(context: Context, new: Generation, old: Generation, host: Host) -> str | None:
    """Return the reason why two generations cannot run side by side; None if they can."""
    if old.door is None or new.door is None:
        return "no front door: requests fail meanwhile"
    if old.plan.engine_listen_port == new.plan.engine_listen_port:
        # A rollback keeps its port, so it may get the port of the generation that is installed.
        return f"both want port {new.plan.engine_listen_port}"
    installed = claims.installed_claims(context.machine, context.paths)
    declared = (*other_claims(installed, new.stack), claim_of(old.plan))
    for need, limit in _needs_and_limits(new.plan, host, declared):
        if limit is None or need > limit:
            left = "unknown" if limit is None else format_bytes(max(0, limit))
            return f"both do not fit: {format_bytes(need)} more, {left} left beside the old one"
    need, free = new.plan.memory.total_bytes, host.memory.available_bytes
    if not new.plan.placement.gpus and free is not None and need > free:
        return f"both do not fit: {format_bytes(need)} more, {format_bytes(free)} free now"
    return None


def _needs_and_limits(
    plan: Plan, host: Host, declared: Sequence[Claim]
) -> list[tuple[int, int | None]]:
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
    from stackctl.deploy import proxy  # it imports requests, and plans need only this module

    old = before.generation if not before.is_stopped else None
    held = {old.plan.port, old.plan.engine_port} if old else set()
    if before.is_stopped and proxy.is_installed(context, new.stack):
        held.add(before.generation.plan.port if before.generation else None)
    scope = context.machine, context.paths
    others = other_claims(claims.installed_claims(*scope), new.stack)
    binding = other_claims(claims.enforceable_claims(*scope), new.stack)
    kept = None
    if new.operation == "rollback":
        kept = f"a rollback keeps its ports: stop that, or stackctl up {new.plan.profile}"
    for port in (new.plan.port, new.plan.engine_port):
        if port is None or port in held:
            continue
        require_port(context.machine, port, kept)
        if owner := port_owner(binding, port):
            raise StackctlError(
                f"port {port} belongs to {owner}",
                hint=kept or f"another port: --set port={port + 1}, or stackctl down {owner}",
            )
        if owner := port_owner(others, port):
            context.progress.warn(f"port {port} is claimed by {owner[:40]}, a stack of a user")
    if not force:
        gone = None if old is None or new.side_by_side else old.plan
        require_free_memory(host, new.plan, gone)


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
