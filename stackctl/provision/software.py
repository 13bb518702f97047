"""Programs and folders: Podman, where models are, stackctl itself, and its guard."""

from __future__ import annotations

import re

from stackctl.probe.problems import TOO_OLD, UPGRADE
from stackctl.provision import ours, paths
from stackctl.provision.facts import Facts, Needs
from stackctl.values.provision import (
    FolderChange,
    GuardChange,
    HoldChange,
    ItemPlan,
    PackagesChange,
    ProgramChange,
)

_OLDEST = (4, 4)
#: Packages of NVIDIA's driver: one new part beside an old one that is loaded, and no GPU is found.
_DRIVER = re.compile(
    r"(nvidia-(driver|dkms|kernel|utils|compute|firmware|settings|persistenced|modprobe|open)"
    r"|libnvidia-|xserver-xorg-video-nvidia|cuda-drivers)[\w.+-]*"
)


def podman(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """Podman with Quadlet, and what rootless containers need."""
    item, why = "podman", "containers run under Podman, and systemd starts them by its Quadlet"
    version = facts.host.tools.podman
    if version is not None and _numbers(version) < _OLDEST:
        return _refused(item, why, f"podman {version} has no Quadlet, which came with 4.4", UPGRADE)
    if (*facts.families[:1], facts.release) in TOO_OLD and version is None:
        problem = f"{facts.host.tools.os}: its podman has no Quadlet, which came with 4.4"
        return _refused(item, why, problem, UPGRADE)
    wanted = paths.packages(facts.families, facts.release)
    if facts.packages is None or not wanted:
        if version is not None:
            return ours.set_already(item, why, version, None)
        return _refused(
            item, why, f"packages are installed on Debian and Ubuntu only; this is "
            f"{facts.host.tools.os or 'another system'}",
            "install podman 4.4 or newer, uidmap and passt with its own tools, then again",
        )  # fmt: skip
    if version is not None and "podman" not in facts.packages:
        # Somebody built it: the distribution's own beside it would come in its way.
        wanted = tuple(name for name in wanted if name in paths.HELPERS)
    missing = tuple(name for name in wanted if name not in facts.packages)
    if not missing:
        return ours.set_already(item, why, version or facts.packages.get("podman") or "", None)
    change = PackagesChange(names=missing, all_names=facts.simulated)
    now = f"podman {version}" if version else "not installed"
    undo = "removes these packages and what came with them; images stay in /var/lib/containers"
    return ours.planned(item, why, now, undo, change)


def models(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """A folder for models that every stack may read."""
    item, why = "models", "a place for models that services of every user can read"
    if paths.MODELS in facts.folders:
        return ours.set_already(item, why, paths.MODELS, None)
    owner = facts.user.name if facts.user is not None else None
    change = FolderChange(path=paths.MODELS, owner=owner)
    return ours.planned(item, why, None, "removes the folder when it is empty", change)


def driver_hold(facts: Facts, needs: Needs) -> ItemPlan:
    """The GPU's driver stays as it is until its owner updates it."""
    item = "driver-hold"
    why = "an update beside the loaded driver takes the GPU away until the next boot"
    if not needs.gpu or not facts.host.gpus:
        return ours.skipped(item, why, "no GPU is used" if facts.host.gpus else "no GPU")
    found = tuple(sorted(n for n in facts.packages or () if _DRIVER.fullmatch(n)))
    if not found:
        return ours.skipped(item, why, "the driver did not come from the distribution's packages")
    loose = tuple(name for name in found if name not in facts.held)
    if not loose:
        return ours.set_already(item, why, f"{len(found)} packages are held", None)
    now = f"{len(loose)} packages may be updated at any time"
    return ours.planned(item, why, now, "releases them", HoldChange(names=loose))


def program(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """stackctl where only root can change it, and in everybody's search path."""
    item = "stackctl"
    why = "sudo, timers and other users find it, and only root can change it"
    folder = ProgramChange(folder=paths.PROGRAM_FOLDER, link=paths.LINK)
    undo = f"removes {paths.PROGRAM_FOLDER} and the link"
    if facts.program is not None and not facts.program_ours:
        if facts.program_weakness is None:
            return ours.set_already(item, why, facts.program, None)
        return _refused(
            item, why, f"{facts.program} is not stackctl's: {facts.program_weakness}",
            f"sudo rm {facts.program}, then again",
        )  # fmt: skip
    if facts.program is not None and facts.program_current:
        return ours.set_already(item, why, facts.program, None)
    if facts.python_weakness is not None:
        return _refused(
            item, why, f"the Python that runs this could be changed: {facts.python_weakness}",
            "make the virtual environment of stackctl with the system's python3, then again",
        )  # fmt: skip
    now = f"{facts.program}, another version" if facts.program else "not in root's search path"
    return ours.planned(item, why, now, undo, folder)


def guard(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """The timer that looks after stacks."""
    item = "guard"
    why = "every minute stacks are checked, and an engine that is dead is restarted"
    user = facts.user
    if user.guarded if user is not None else facts.guarded:
        return ours.set_already(item, why, "on", None)
    change = GuardChange(
        user=user.name if user is not None else None, program=facts.program or paths.LINK
    )
    whose = f"stacks of {user.name}" if user is not None else "stacks of the system"
    return ours.planned(item, why, f"off for {whose}", "stops and removes the timer", change)


def _refused(item: str, why: str, problem: str, remedy: str) -> ItemPlan:
    return ItemPlan(item=item, status="refused", why=why, problem=problem, remedy=remedy)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,6}", version)[:2])
