"""Checks before the machine is changed: tools, model files, ports, free memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import ports
from stackctl.machine.machine import Machine
from stackctl.quantity import format_bytes
from stackctl.requirements.gpu import gpu_memory_users
from stackctl.requirements.systemd import KERNEL_ARGUMENT
from stackctl.units.quadlet import INSTALL_PODMAN, parse_version
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile


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
            raise StackctlError(
                silent.what,
                details=(silent.why,),
                hint="podman --version shows what is wrong",
                exit_code=ExitCode.HOST,
            )
        raise _lacks(
            "podman is not installed",
            f"{INSTALL_PODMAN}: apt-get install podman",
        )
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
        hint=f"{_here(model.format)}, or --model hf:ORG/REPO, which is fetched; "
        "stackctl plan works without the files",
    )


def _here(model_format: Literal["gguf", "safetensors"]) -> str:
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
    available = host.memory.available_bytes
    if available is not None and main > available + held_main:
        raise _no_room(
            plan, "memory", main, available + held_main,
            "ps --sort=-rss -eo pid,rss,comm lists them",
        )  # fmt: skip
    for gpu in host.gpus:
        need, held = gpus.get(str(gpu.index), 0), held_gpus.get(str(gpu.index), 0)
        if gpu.free_bytes is not None and need > gpu.free_bytes + held:
            free = gpu.free_bytes + held
            how = gpu_memory_users(gpu) or "nvidia-smi lists them"
            raise _no_room(plan, f"GPU {gpu.index}", need, free, how)


def _needs(plan: Plan) -> tuple[int, dict[str, int]]:
    """Return the bytes that a plan needs of main memory, and of each GPU by its index."""
    if not plan.placement.gpus:
        return plan.memory.total_bytes, {}
    main = plan.host_memory.total_bytes if plan.host_memory is not None else 0
    return main, dict.fromkeys(plan.placement.gpus, plan.memory.total_bytes)


def _no_room(plan: Plan, pool: str, need: int, free: int, how: str) -> StackctlError:
    return StackctlError(
        f"{plan.stack} needs {format_bytes(need)} of {pool}, {format_bytes(free)} is available now",
        hint=f"end the processes that use it ({how}), or --force starts it anyway",
        exit_code=ExitCode.REFUSED,
    )


def _lacks(message: str, hint: str) -> StackctlError:
    return StackctlError(message, hint=hint, exit_code=ExitCode.HOST)
