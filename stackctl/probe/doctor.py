"""The findings of ``stackctl doctor``, from a Host alone, with the fix of each.

``fail`` keeps a stack from starting as planned, ``warn`` makes it slower or less dependable,
``info`` is worth knowing, ``skip`` could not be read. Each requirement judges its own part:
stackctl/requirements/.
"""

from __future__ import annotations

from stackctl.requirements import REQUIREMENTS
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.gpu import DEFAULT_CUDA
from stackctl.requirements.requirement import code_of
from stackctl.values.host import Host
from stackctl.values.result import Result, Status

_ORDER: tuple[Status, ...] = ("fail", "warn", "info", "skip", "ok")


def findings(
    host: Host,
    *,
    memlock_bytes: int | None = None,
    needs_cpuset: bool = False,
    needs_gpu: bool = False,
    nvfp4: bool | None = None,
    cuda: str | None = DEFAULT_CUDA,
) -> tuple[Result, ...]:
    """Return all findings, most important first.

    Args:
        host: the machine, as probed for the scope that will run the stack.
        memlock_bytes: memory that the engine wants to lock; None: it locks none.
        needs_cpuset: the stack is bound to CPUs or nodes.
        needs_gpu: the stack uses a GPU.
        nvfp4: the model is quantised to nvfp4; None: unknown.
        cuda: the CUDA of its image; None: unknown.
    """
    needs = StackNeeds(
        gpu=needs_gpu, memlock=memlock_bytes is not None, cpuset=needs_cpuset,
        memlock_bytes=memlock_bytes, nvfp4=nvfp4, cuda=cuda,
    )  # fmt: skip
    found = [result for requirement in REQUIREMENTS for result in requirement.check(host, needs)]
    judged = {code for requirement in REQUIREMENTS for code in requirement.codes}
    # A problem of the probe that no requirement judges must not get lost.
    found += [
        Result(
            name="probe", status="warn", actual=problem.what, evidence=problem.why,
            remedy=problem.fix,
        )
        for problem in host.problems
        if code_of(problem) not in judged
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda result: _ORDER.index(result.status)))
