"""What slows a stack down: what was looked at, and the document ``stackctl.diagnose/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.metrics import EngineMetrics, LogSamples
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Slo
from stackctl.values.result import Result
from stackctl.values.seen import NodeBytes

Confidence = Literal["high", "medium", "low"]


class CpuTime(Value, frozen=True, kw_only=True):
    """What the threads of an engine did between two looks, in seconds summed over threads.

    ``ran_s`` on a processor, ``waited_s`` ready to run while other work had the processors (the
    scheduler's own count, /proc/PID/task/TID/schedstat). ``busy`` threads ran at least a quarter of
    the time. ``allowed`` is how many CPUs they may use.
    """

    interval_s: float
    ran_s: float
    waited_s: float
    threads: int
    busy: int
    allowed: int | None = None


#: Reasons for which a GPU holds its clock down, as NVML reports them (nvml.h: clocks event
#: reasons).
ClockLimit = Literal["power-limit", "hardware", "heat-software", "heat-hardware", "power-brake"]


class GpuNow(Value, frozen=True, kw_only=True):
    """A GPU at this moment, as NVML has it. ``throttled`` names what holds its clock down;
    ``pids`` are the processes that hold its memory (None: not told)."""

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
    """All that a diagnosis may use; every part may be absent.

    ``before`` and ``now`` are two looks at the engine's numbers, ``interval_s`` apart; ``before``
    is None when one look was enough: nothing ran. ``late`` says that it did not tell its numbers in
    time. ``asked`` is what the command line said of the profile when the stack was deployed.
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
    gpus: tuple[GpuNow, ...] = ()


class Step(Value, frozen=True, kw_only=True):
    """One thing to do, and the command or the client's setting that does it."""

    do: str
    command: str | None = None


class Finding(Result, frozen=True, kw_only=True):
    """A result with how sure it is, what to do in which order, and what that should bring.

    ``remedy`` of the Result holds the same steps as one text. ``effect`` is a sentence;
    ``at_stake`` the share (0 to 1) of the time of requests that it is about, by which findings are
    ordered; None where it is not known.
    """

    confidence: Confidence | None = None
    steps: tuple[Step, ...] = ()
    effect: str | None = None
    at_stake: float | None = None


class DiagnoseReport(Value, frozen=True, kw_only=True):
    """Findings, most important first, then what was cleared (status ok), then notes (info).

    ``engine`` whose words were read, ``source`` the log's name, or None for a stack; ``windows``
    and ``requests`` count what the log told.
    """

    schema: Literal["stackctl.diagnose/1"] = "stackctl.diagnose/1"
    stack: str | None = None
    source: str | None = None
    engine: str | None = None
    windows: int = 0
    requests: int = 0
    results: tuple[Finding, ...]
