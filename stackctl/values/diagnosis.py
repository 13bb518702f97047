"""The evidence and the findings of a diagnosis: the document ``stackctl.diagnose/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.inspection import NodeBytes
from stackctl.values.metrics import EngineMetrics, LogSamples
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Slo
from stackctl.values.result import Result

Confidence = Literal["high", "medium", "low"]


class CpuTime(Value, frozen=True, kw_only=True):
    """CPU time of an engine's threads between two snapshots, in seconds summed over threads.

    ``ran_s`` is time on a CPU, ``waited_s`` time ready to run without a CPU, both as the scheduler
    counts them (/proc/PID/task/TID/schedstat). ``busy`` counts threads that ran or waited for at
    least a quarter of the interval. ``allowed`` is the number of CPUs that they may use.
    """

    interval_s: float
    ran_s: float
    waited_s: float
    threads: int
    busy: int
    allowed: int | None = None


#: Reasons for which a GPU reduces its clock, as NVML reports them (nvml.h: clocks event
#: reasons).
ClockLimit = Literal["power-limit", "hardware", "heat-software", "heat-hardware", "power-brake"]


class GpuStatus(Value, frozen=True, kw_only=True):
    """The state of a GPU at this moment, as NVML reports it.

    ``throttled`` lists the reasons for a reduced clock. ``pids`` are the processes that hold its
    memory (None: the driver does not report them).
    """

    index: int
    name: str | None = None
    utilization: float | None = None
    used_bytes: int | None = None
    memory_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    clock_mhz: int | None = None
    clock_most_mhz: int | None = None
    throttled: tuple[ClockLimit, ...] = ()
    pids: tuple[int, ...] | None = None


class Evidence(Value, frozen=True, kw_only=True):
    """The input of a diagnosis; every part may be absent.

    ``before`` and ``now`` are the engine's metrics, read ``interval_s`` apart; ``before`` is None
    if no request ran, because one snapshot is enough then. ``late``: the engine did not report its
    metrics in time. ``asked`` holds the command-line settings with which the stack was deployed.
    """

    stack: str | None = None
    profile: str | None = None
    log: LogSamples | None = None
    before: EngineMetrics | None = None
    now: EngineMetrics | None = None
    interval_s: float | None = None
    late: bool = False
    plan: Plan | None = None
    slo: Slo | None = None
    asked: Overrides = Overrides()
    cpu: CpuTime | None = None
    pages: tuple[NodeBytes, ...] = ()
    pids: tuple[int, ...] = ()
    gpus: tuple[GpuStatus, ...] = ()


class Step(Value, frozen=True, kw_only=True):
    """One action, and the command or the client setting for it."""

    do: str
    command: str | None = None


class Finding(Result, frozen=True, kw_only=True):
    """A result with its confidence, the steps to take in their order, and the expected effect.

    ``remedy`` of the Result holds the same steps as one text. ``at_stake`` is the share (0 to 1) of
    the requests' time that the finding concerns; findings are ordered by it. None: unknown.
    """

    confidence: Confidence | None = None
    steps: tuple[Step, ...] = ()
    effect: str | None = None
    at_stake: float | None = None


class DiagnoseReport(Value, frozen=True, kw_only=True):
    """Findings, most important first, then cleared subjects (status ok), then notes (info).

    ``source`` is the name of the log file (None: a running stack was diagnosed). ``windows`` and
    ``requests`` are the numbers of samples in the log.
    """

    schema: Literal["stackctl.diagnose/1"] = "stackctl.diagnose/1"
    stack: str | None = None
    source: str | None = None
    engine: str | None = None
    windows: int = 0
    requests: int = 0
    results: tuple[Finding, ...]
