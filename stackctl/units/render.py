"""Renders a plan into the unit files of its stack. Pure, but for reading the shipped template."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Literal

import jinja2
import msgspec

from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.units import quoting
from stackctl.units.quadlet import Keys, parse_version
from stackctl.values.claim import Claim
from stackctl.values.host import UNLIMITED
from stackctl.values.plan import Plan
from stackctl.values.profile import NAME_PATTERN
from stackctl.values.unit import UnitFile, UnitSet

#: Restarts before systemd gives up, and the pause between them in seconds.
RESTARTS = 3
RESTART_PAUSE_S = 5
_GENERATION = re.compile(r"^Generation=(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """What the text of a unit depends on besides the plan.

    ``image`` is the pinned reference (digest or image ID), ``program`` what must be started in it
    (empty: its entry point), ``podman`` the version whose keys are used (None: the newest),
    ``claim`` what the stack takes of the machine: written into the unit for other plans to read.
    """

    scope: Literal["user", "system"]
    podman: str | None
    image: str
    program: tuple[str, ...]
    claim: Claim


def service_name(stack: str) -> str:
    """The systemd service of a stack."""
    return f"{stack}.service"


def render(plan: Plan, target: Target, generation: int) -> UnitSet:
    """The unit files of one generation of a stack.

    Raises:
        StackctlError: exit 2 for values that a unit cannot hold, 6 for a Podman without Quadlet.
    """
    if plan.placement.gpus or plan.engine == "vllm":
        raise StackctlError(
            f"{plan.profile}: this version plans for GPUs, but does not launch on them yet",
            hint="stackctl plan shows the engine's arguments",
            exit_code=ExitCode.REFUSED,
        )
    for name in (plan.stack, plan.profile, plan.objective):
        # Held by the profile's schema; the template writes them as they are, on lines of their own.
        if not re.fullmatch(NAME_PATTERN, name):
            raise StackctlError(f"{name[:40]!r} is not a name", exit_code=ExitCode.USAGE)
    keys = Keys(parse_version(target.podman))
    template = _environment().get_template("engine.container.j2")
    memlock = plan.memlock_bytes
    text = template.render(
        plan=plan,
        target=target,
        generation=generation,
        container=container_name(plan.stack),
        arguments=(*target.program, *plan.argv[1:]),
        mounts=[
            (file.path, quoting.volume(file.path, f"/models/{file.path.rpartition('/')[2]}", "ro"))
            for file in plan.model.files
        ],
        health=f"curl --fail --silent --show-error --max-time 5 "
        f"http://127.0.0.1:{plan.port}{find_engine(plan.engine).health_path}",
        claim=json.dumps(msgspec.to_builtins(target.claim), ensure_ascii=True),
        memlock=None if memlock is None else "-1" if memlock == UNLIMITED else str(memlock),
        restarts=RESTARTS,
        restart_pause=RESTART_PAUSE_S,
        # Must be longer than all the attempts that it counts, or it never trips.
        restart_window=(RESTARTS + 1) * (plan.timing.ceiling_s + RESTART_PAUSE_S),
        key=keys.key,
        argument=keys.argument,
        podman_args=keys.podman_args,
        version=keys.version,
    )
    return UnitSet(
        stack=plan.stack,
        service=service_name(plan.stack),
        container=container_name(plan.stack),
        files=(UnitFile(name=f"{plan.stack}.container", text=quoting.unit(text)),),
    )


def container_name(stack: str) -> str:
    """The container's name; constant, so that a reloaded unit can still stop an older one."""
    return f"stackctl-{stack}"


def log_identifier(stack: str, generation: int) -> str:
    """What marks a generation's lines in the journal."""
    return f"{stack}-g{generation}"


def without_generation(text: str) -> str:
    """The text of a unit without its number, to tell whether two say the same."""
    text = _GENERATION.sub("Generation=", text)
    return re.sub(r"^SyslogIdentifier=.*$", "SyslogIdentifier=", text, flags=re.MULTILINE)


def generation_of(text: str) -> int | None:
    """The number of the generation that a unit text belongs to."""
    match = _GENERATION.search(text)
    return int(match[1]) if match else None


def profile_of(text: str) -> str | None:
    """The name of the profile that a unit text was made from."""
    match = re.search(r"^Profile=(\S+)$", text, re.MULTILINE)
    return match[1] if match else None


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # unit files, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = quoting.text
    environment.filters["variable"] = quoting.variable
    environment.filters["mount_point"] = quoting.mount_point
    environment.tests["plain_path"] = quoting.is_plain_path
    environment.globals["log_identifier"] = log_identifier
    return environment
