"""Whether containers get the GPUs that a plan wants: judged first, then proven with Podman."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from stackctl.engines.protocol import Failure
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.requirements import gpu_findings
from stackctl.requirements.cdi import GENERATE
from stackctl.requirements.gpu import DEFAULT_CUDA
from stackctl.units import devicewait
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Plan
from stackctl.values.result import Result

_GENERATE = f"sudo {GENERATE}"
_UNRESOLVABLE = r"unresolvable CDI devices? (?P<name>\S+)"
_NO_DEVICE = "podman finds no device {name} in the CDI files that it can read"
#: Of a machine that had the file, and at this boot has not.
_LOOK = "stackctl provision --only cdi says what is missing"
#: Words of podman and crun, what they mean for a device, and what helps.
_PROOFS = (
    (_UNRESOLVABLE, _NO_DEVICE, _GENERATE),
    (r"(?P<name>/\S+nvidia-c(di|tk)\S*)|error (executing|running) hook",
     "the hook that a CDI file names fails",
     f"install nvidia-container-toolkit, then: {_GENERATE}"),
    (r"(?P<name>/[^\s`:\"']+)[`\"']?: No such file or directory",
     "a CDI file names {name}, which is not there", _GENERATE),
    (r"(?P<name>/[^\s`:\"']+)[`\"']?: (Permission denied|Operation not permitted)",
     "this user may not use {name}", "ls -l {name} shows who may"),
)  # fmt: skip


def planned(host: Host, plan: Plan) -> tuple[Gpu, ...]:
    """The GPUs that a plan places its stack on."""
    return tuple(gpu for gpu in host.gpus if str(gpu.index) in plan.placement.gpus)


def names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """What CDI calls them."""
    return tuple(gpu.cdi or f"nvidia.com/gpu={gpu.index}" for gpu in gpus)


def require_gpus(host: Host, plan: Plan, *, cuda: str | None = DEFAULT_CUDA) -> tuple[Result, ...]:
    """What must be so before GPUs are given to a container; nothing for a plan without.

    Free memory is not judged here: that is a matter of what runs now (preflight).

    Returns:
        Findings that are no obstacle, to be told.

    Raises:
        StackctlError: exit 6 for what the host lacks, 5 for GPUs that cannot run the model.
    """
    if not plan.placement.gpus:
        return ()
    only = msgspec.structs.replace(host, gpus=planned(host, plan))
    found = [
        result
        for result in gpu_findings(only, nvfp4=plan.model.is_nvfp4, cuda=cuda)
        if result.name != "gpu-memory"
    ]
    failed = [result for result in found if result.status == "fail"]
    if not failed:
        return tuple(result for result in found if result.status == "warn")
    first = failed[0]
    raise StackctlError(
        f"{plan.stack} cannot have its GPU: {first.actual}",
        details=[
            f"expected {first.expected}",
            *((first.evidence,) if first.evidence else ()),
            *(f"also {other.name}: {other.actual}" for other in failed[1:]),
        ],
        hint=first.remedy,
        exit_code=ExitCode.REFUSED if first.name == "gpu-nvfp4" else ExitCode.HOST,
    )


def prove(image: str, gpus: tuple[Gpu, ...]) -> None:
    """Have Podman prepare a container with the GPUs, and throw it away.

    Raises:
        StackctlError: exit 6 with the cause, Podman's own words and the remedy.
    """
    devices = names(gpus)
    if not devices:
        return
    done = podman.init_with(image, devices)
    if done.status == 0:
        return
    said = done.stderr.strip()
    cause, remedy = explain(said)
    raise StackctlError(cause, details=said.splitlines()[-2:], hint=remedy, exit_code=ExitCode.HOST)


def failure(lines: Sequence[str], *, waits: bool = False) -> Failure | None:
    """Why a unit's container got no GPU, by the unit's log; with ``waits`` also why not yet."""
    kind = devicewait.missing(lines, waits=waits)
    if kind is not None:
        cause = f"no file in /etc/cdi or /run/cdi describes {kind}"
        return Failure(cause, cause, _LOOK)
    for line in reversed(lines):
        if match := re.search(_UNRESOLVABLE, line):
            return Failure(_NO_DEVICE.format(name=match["name"].rstrip(",;:")), line.strip(), _LOOK)
    return None


def explain(said: str) -> tuple[str, str]:
    """Cause and remedy of what Podman says when it cannot give a container its devices."""
    for pattern, cause, remedy in _PROOFS:
        if match := re.search(pattern, said, re.IGNORECASE):
            name = (match["name"] or "").rstrip(",;:")
            return cause.format(name=name), remedy.format(name=name)
    return "podman cannot make a container with the GPU", "podman info shows what is wrong"
