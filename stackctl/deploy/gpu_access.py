"""Checks that containers get the GPUs of a plan: by the host's facts, then with Podman."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from stackctl.engines.failures import Failure
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.requirements import gpu_findings
from stackctl.requirements.cdi import missing_device_remedy
from stackctl.requirements.gpu import DEFAULT_CUDA
from stackctl.units import wait_for_cdi
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Plan
from stackctl.values.result import Result

_UNRESOLVABLE = r"unresolvable CDI devices? (?P<name>\S+)"
_NO_DEVICE = "podman finds no device {name} in the CDI files that it can read"
#: Remedy on a machine whose CDI file was not created at this boot.
_LOOK = "stackctl provision --only cdi says what is missing"
#: Messages of podman and crun, their cause, and the remedy with that for CDI files.
_PROOFS = (
    (_UNRESOLVABLE, _NO_DEVICE, "{cdi}"),
    (r"(?P<name>/\S+nvidia-c(di|tk)\S*)|error (executing|running) hook",
     "the hook that a CDI file names fails",
     "install nvidia-container-toolkit, then: {cdi}"),
    (r"(?P<name>/[^\s`:\"']+)[`\"']?: No such file or directory",
     "a CDI file names {name}, which is not there", "{cdi}"),
    (r"(?P<name>/[^\s`:\"']+)[`\"']?: (Permission denied|Operation not permitted)",
     "this user may not use {name}", "ls -l {name} shows who may"),
)  # fmt: skip


def planned_gpus(host: Host, plan: Plan) -> tuple[Gpu, ...]:
    """Return the GPUs that a plan places its stack on."""
    return tuple(gpu for gpu in host.gpus if str(gpu.index) in plan.placement.gpus)


def cdi_names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Return the CDI names of GPUs."""
    return tuple(gpu.cdi or f"nvidia.com/gpu={gpu.index}" for gpu in gpus)


def require_gpus(host: Host, plan: Plan, *, cuda: str | None = DEFAULT_CUDA) -> tuple[Result, ...]:
    """Check the host's requirements for the GPUs of a plan; a plan without GPUs has none.

    Free memory is not checked here, because it depends on the present load; see preflight.

    Returns:
        The warnings.

    Raises:
        StackctlError: exit 6 if the host lacks a requirement, 5 for GPUs that cannot run the model.
    """
    if not plan.placement.gpus:
        return ()
    only = msgspec.structs.replace(host, gpus=planned_gpus(host, plan))
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


def test_gpu_container(image: str, gpus: tuple[Gpu, ...], host: Host) -> None:
    """Let Podman prepare a container with GPUs of the host, and remove it unstarted.

    Raises:
        StackctlError: exit 6 with the cause, Podman's messages and the remedy.
    """
    devices = cdi_names(gpus)
    if not devices:
        return
    done = podman.create_with_devices(image, devices)
    if done.status == 0:
        return
    said = done.stderr.strip()
    cause, remedy = explain_device_error(said, missing_device_remedy(host))
    raise StackctlError(cause, details=said.splitlines()[-2:], hint=remedy, exit_code=ExitCode.HOST)


def device_failure(lines: Sequence[str], *, waits: bool = False) -> Failure | None:
    """Return the reason in a unit's log why its container got no GPU; None without one.

    With ``waits`` a unit that still waits for its GPUs counts too.
    """
    kind = wait_for_cdi.missing_device(lines, waits=waits)
    if kind is not None:
        cause = f"no file in /etc/cdi or /run/cdi describes {kind}"
        return Failure(cause, cause, _LOOK)
    for line in reversed(lines):
        if match := re.search(_UNRESOLVABLE, line):
            return Failure(_NO_DEVICE.format(name=match["name"].rstrip(",;:")), line.strip(), _LOOK)
    return None


def explain_device_error(said: str, cdi: str) -> tuple[str, str]:
    """Return cause and remedy for Podman's messages about devices that a container did not get.

    ``cdi`` is the remedy if a CDI file is the cause.
    """
    for pattern, cause, remedy in _PROOFS:
        if match := re.search(pattern, said, re.IGNORECASE):
            name = (match["name"] or "").rstrip(",;:")
            return cause.format(name=name), remedy.format(name=name, cdi=cdi)
    return "podman cannot make a container with the GPU", "podman info shows what is wrong"
