"""Causes of slowness that can be removed: in the CPUs, the memory, the GPU and the model."""

from __future__ import annotations

from collections.abc import Mapping

from stackctl.diagnose import remedies
from stackctl.diagnose.load_summary import LoadSummary
from stackctl.diagnose.results import cleared, format_seconds
from stackctl.quantity import format_bytes, format_share
from stackctl.values.diagnosis import ClockLimit, CpuTime, Evidence, Finding, GpuStatus, Step

#: The rule on waiting for CPUs needs threads that ran or waited for this share of the interval.
_WORKS = 0.1
_WAITED, _WAITED_MUCH = 0.2, 0.5
#: An engine has its CPUs to itself if it ran on them for this share of the time.
_OWN = 0.8
#: Measured with a model of 270M parameters.
_MEASURED_CROWD = "4 threads on 2 cores gave 32 tok/s where 2 gave 75 (270M)"
_ELSEWHERE = 0.05
_UNEVEN = 1.5
#: GPUs reduce their clocks a little all the time; only a share below this is a finding.
_SLOWED = 0.85
_CLOCK_LIMITS: Mapping[ClockLimit, str] = {
    "power-limit": "power limit",
    "hardware": "hardware slowdown",
    "heat-software": "heat (software)",
    "heat-hardware": "heat (hardware)",
    "power-brake": "power brake",
}


def cpu_fallback(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find an engine that should use a GPU and computes on the CPU."""
    planned = evidence.plan.placement.gpus if evidence.plan else ()
    log = evidence.log
    proof = None
    if log is not None and log.fallback is not None:
        proof = f"its log: {log.fallback}"
    elif planned and log is not None and log.place == "CPU":
        proof = "its log has a CPU KV cache"
    elif planned and (own := _ours(evidence)) is not None and not own:
        proof = "none of its processes holds memory of a GPU"
    if proof is None:
        return None
    profile = evidence.profile or "PROFILE"
    return Finding(
        name="cpu-fallback",
        status="fail",
        actual="the CPU does the work of the GPU",
        expected=f"on the GPU {','.join(planned)}".rstrip(),
        evidence=proof,
        confidence="high",
        steps=(
            Step(do="find what stands in the way", command=f"stackctl doctor {profile}"),
            Step(do="then start it again", command=f"stackctl restart {evidence.stack or 'STACK'}"),
        ),
        effect="a GPU reads memory several times as fast",
        at_stake=0.9,
    )


def _ours(evidence: Evidence) -> bool | None:
    """Return True if a process of the engine holds memory of a planned GPU; None if unknown.

    Some drivers list no processes: memory in use without a process may be the engine's.
    """
    if evidence.plan is None or not evidence.pids:
        return None
    wanted, weights = set(evidence.plan.placement.gpus), evidence.plan.memory.weights_bytes
    seen = [gpu for gpu in evidence.gpus if str(gpu.index) in wanted]
    if not seen or any(gpu.pids is None or gpu.used_bytes is None for gpu in seen):
        return None
    if any(set(gpu.pids or ()) & set(evidence.pids) for gpu in seen):
        return True
    used = sum(gpu.used_bytes or 0 for gpu in seen)
    return None if used >= weights / 2 and not any(gpu.pids for gpu in seen) else False


def cpu_contention(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find threads that wait for a CPU: other processes use it, or the threads are too many."""
    cpu, planned = evidence.cpu, remedies.generating_threads(evidence)
    planned_cpus = evidence.plan.placement.cpus if evidence.plan else None
    allowed = (cpu.allowed if cpu else None) or len(planned_cpus or ()) or None
    # Set to (threads, CPUs) if there are more threads than CPUs.
    crowd = None
    if planned is not None and allowed is not None and planned > allowed:
        crowd = (planned, allowed)
    if cpu is None or cpu.ran_s + cpu.waited_s < _WORKS * cpu.interval_s:
        return _too_many(evidence, *crowd, None) if crowd else None
    waited = cpu.waited_s / (cpu.ran_s + cpu.waited_s)
    if waited < _WAITED:
        return cleared("oversubscribed-threads", f"waited {format_share(waited)} of the time")
    if crowd:
        return _too_many(evidence, *crowd, waited)
    # The engine's share of the time of its CPUs; other processes had the rest.
    had = min(1.0, cpu.ran_s / (cpu.allowed * cpu.interval_s)) if cpu.allowed else 1 - waited
    if had >= _OWN:
        return _own_crowd(evidence, cpu, waited)
    return _others_compute(evidence, cpu, waited, had)


def _others_compute(evidence: Evidence, cpu: CpuTime, waited: float, had: float) -> Finding:
    """Report that other processes use the CPUs that the engine's threads wait for."""
    gain = min(1 / had, 1 / (1 - waited)) if had > 0 and waited < 1 else None
    return Finding(
        name="oversubscribed-threads",
        status="fail" if waited >= _WAITED_MUCH else "warn",
        actual=f"its threads waited for a core {format_share(waited)} of the time: "
        "others have them",
        expected=f"under {format_share(_WAITED)}",
        evidence=f"in {format_seconds(cpu.interval_s)}: {cpu.ran_s:.1f} s on a core, "
        f"{cpu.waited_s:.1f} s waiting; {cpu.busy} busy threads"
        + (f" on {cpu.allowed} CPUs" if cpu.allowed else ""),
        confidence="high",
        steps=(
            Step(do="see who has them", command="ps -eo pid,psr,pcpu,comm --sort=-pcpu | head"),
            Step(
                do="end it, or give the stack cores of its own",
                command=remedies.deploy_with_settings(evidence, "placement.cpus=LIST"),
            ),
        ),
        effect=f"up to {gain:.1f} times as fast" if gain else None,
        at_stake=waited,
    )


def _own_crowd(evidence: Evidence, cpu: CpuTime, waited: float) -> Finding:
    """Report an engine that has its CPUs to itself and more busy threads than CPUs."""
    return Finding(
        name="oversubscribed-threads",
        status="warn",
        actual=f"{cpu.busy} busy threads on {cpu.allowed} CPUs: they waited for each other "
        f"{format_share(waited)} of the time",
        expected=f"under {format_share(_WAITED)}",
        evidence=f"in {format_seconds(cpu.interval_s)}: {cpu.ran_s:.1f} s on a core, "
        f"{cpu.waited_s:.1f} s waiting",
        confidence="medium",
        steps=(_fewer_threads(evidence, cpu.allowed),),
        effect=_MEASURED_CROWD,
        at_stake=waited,
    )


def _too_many(evidence: Evidence, planned: int, allowed: int, waited: float | None) -> Finding:
    return Finding(
        name="oversubscribed-threads",
        status="fail",
        actual=f"{planned} threads on {allowed} CPUs",
        expected=f"at most {allowed}",
        evidence=None if waited is None else f"they waited {format_share(waited)} of the time",
        confidence="high",
        steps=(_fewer_threads(evidence, allowed),),
        effect=_MEASURED_CROWD,
        at_stake=waited if waited is not None else 0.5,
    )


def _fewer_threads(evidence: Evidence, cpus: int | None) -> Step:
    option = remedies.threads_option(evidence)
    if option is None:
        command = remedies.deploy_with_settings(evidence, "placement.cpus=LIST")
        return Step(do="more CPUs", command=command)
    command = remedies.deploy_with_settings(evidence, f"engine_args.{option}={cpus}")
    return Step(do="as many threads as cores", command=command)


def memory_placement(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Compare the nodes of the engine's memory with the planned nodes."""
    placement = evidence.plan.placement if evidence.plan else None
    total = sum(page.bytes for page in evidence.pages)
    if placement is None or placement.mems is None or not total:
        return None
    if placement.policy == "preferred":
        return None  # workers that only feed GPUs may use other nodes if theirs is full
    wanted = placement.mems
    shares = {page.node: page.bytes / total for page in evidence.pages}
    away = sum(part for node, part in shares.items() if node not in wanted)
    most = max((shares.get(node, 0.0) for node in wanted), default=0.0)
    uneven = placement.policy == "interleave" and len(wanted) > 1 and most * len(wanted) > _UNEVEN
    lies = ", ".join(
        f"node {node} holds {format_share(part)}" for node, part in sorted(shares.items())
    )
    where = f"{lies} of {format_bytes(total)}"
    if away >= _ELSEWHERE:
        text = f"{format_share(away)} of its memory lies on other nodes"
    elif uneven:
        text = "its memory is not spread over its nodes"
    else:
        return cleared("page-cache-misplacement", where)
    return Finding(
        name="page-cache-misplacement",
        status="fail" if away >= 0.5 else "warn",
        actual=text,
        expected=f"on node {placement.mems}" + (", evenly" if uneven else ""),
        evidence=f"{where}: pages stay where they were first read",
        confidence="high",
        # The kernel does not drop pages that a process has mapped or locked.
        steps=(
            Step(do="stop it", command=f"stackctl down {evidence.stack or 'STACK'}"),
            Step(
                do="drop the model from the page cache",
                command="echo 1 | sudo tee /proc/sys/vm/drop_caches",
            ),
            Step(do="then read it again", command=remedies.deploy_with_settings(evidence)),
        ),
        effect="placement alone made 4.3 of 2.4 tok/s on two EPYC 9175F (70B)",
        at_stake=0.45 * max(away, most if uneven else 0.0),
    )


def gpu_throttling(evidence: Evidence, load: LoadSummary) -> Finding | None:  # noqa: ARG001
    """Find a planned GPU that reduces its clock because of heat or power."""
    wanted = set(evidence.plan.placement.gpus) if evidence.plan else set()
    seen = [gpu for gpu in evidence.gpus if str(gpu.index) in wanted]
    for gpu in seen:
        # The clock as a share of the highest clock; None if either is not reported.
        clock = gpu.clock_mhz / gpu.clock_most_mhz if gpu.clock_mhz and gpu.clock_most_mhz else None
        hot = any(reason != "power-limit" for reason in gpu.throttled)
        # A GPU at its power limit with nearly its full clock works as intended.
        if hot or (gpu.throttled and clock is not None and clock < _SLOWED):
            return _throttled(gpu, clock, hot=hot)
    known = any(gpu.clock_mhz is not None for gpu in seen)
    return cleared("thermal-limit", "clock not held down") if known else None


def _throttled(gpu: GpuStatus, clock: float | None, *, hot: bool) -> Finding:
    facts = [
        f"{gpu.clock_mhz} of {gpu.clock_most_mhz} MHz" if clock else "",
        f"{gpu.power_w:.0f} of {gpu.power_limit_w:.0f} W"
        if gpu.power_w and gpu.power_limit_w
        else "",
        f"{gpu.temperature_c} °C" if gpu.temperature_c else "",
    ]
    return Finding(
        name="thermal-limit" if hot else "power-limit",
        status="warn",
        actual=f"GPU {gpu.index} holds its clock down: "
        + ", ".join(_CLOCK_LIMITS[reason] for reason in gpu.throttled),
        expected="its full clock",
        evidence=", ".join(filter(None, facts)) or None,
        confidence="high",
        steps=(remedies.COOLING,) if hot else (remedies.MORE_POWER,),
        effect=f"up to {1 / clock:.1f} times as fast" if clock else None,
        at_stake=1 - clock if clock else 0.1,
    )


def looped_model(evidence: Evidence, load: LoadSummary) -> Finding | None:
    """Find a model that runs its layers more than once for every token."""
    if not remedies.is_looped_model(evidence):
        return None
    passes = evidence.plan.model.passes if evidence.plan and evidence.plan.model.passes > 1 else 2
    return Finding(
        name="loop-model",
        status="warn",
        actual=f"the model runs its layers {passes} times for every token",
        expected="once",
        evidence=f"architecture {_architecture(evidence)}",
        confidence="high",
        steps=(
            Step(
                do="the Instruct variant, which runs them once",
                command="stackctl up gpu-nvfp4",
            ),
        ),
        effect="25-28 tok/s instead of 0.6-8 on the reference box (40B nvfp4)",
        at_stake=(1 - (load.prompt_share or 0.0)) * (1 - 1 / passes),
    )


def _architecture(evidence: Evidence) -> str:
    if evidence.plan is not None:
        return evidence.plan.model.architecture
    return (evidence.log.architecture if evidence.log else None) or "unknown"
