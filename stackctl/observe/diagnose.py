"""Evidence for a diagnosis of a running stack; the rules are in stackctl.diagnose."""

from __future__ import annotations

import time

from stackctl.deploy.context import Context
from stackctl.diagnose.load_summary import read_log
from stackctl.diagnose.rules import diagnose
from stackctl.diagnose.stalls import HANG_S, counters_unchanged
from stackctl.errors import ExitCode, StackctlError
from stackctl.observe import engine_snapshot, procfs
from stackctl.probe.nvml import gpu_status
from stackctl.values.cpu_list import CpuList
from stackctl.values.diagnosis import DiagnoseReport, Evidence
from stackctl.values.generation import Generation
from stackctl.values.profile import Slo

#: Seconds between two snapshots: a slow model generates some tokens in that time.
_WATCH_S = 5.0
#: The most lines of a log that are read: hours of an engine that logs a few lines per request.
_MOST_LINES = 50000
#: Seconds that an engine has to report its metrics. A batch of a long prompt may take longer; the
#: evidence then has ``late``.
_PATIENCE_S = 5.0


def diagnose_evidence(evidence: Evidence, *, source: str | None = None) -> DiagnoseReport:
    """Return the findings of some evidence; ``source`` is the name of a log file."""
    log, plan = evidence.log, evidence.plan
    return DiagnoseReport(
        stack=evidence.stack,
        source=source,
        engine=plan.engine if plan else log.engine if log else None,
        windows=len(log.windows) if log else 0,
        requests=len(log.requests) if log else 0,
        results=diagnose(evidence),
    )


def collect_evidence(
    context: Context, generation: Generation, *, slo: Slo | None, since_s: float
) -> Evidence:
    """Collect the evidence about a running engine and the log of its last ``since_s`` seconds.

    While requests run, compare two snapshots some seconds apart, and wait longer if no counter
    moves.

    Raises:
        StackctlError: exit 3 if the stack does not run or ended during the inspection.
    """
    plan, machine = generation.plan, context.machine
    unit = context.systemd.state(generation.units.service)
    if not unit.is_active:
        raise StackctlError(
            f"{generation.stack} does not run (its unit is {unit.active})",
            hint=f"stackctl status {generation.stack} tells why; its log alone: "
            f"stackctl logs {generation.stack} -n 10000 | stackctl diagnose --log -",
            exit_code=ExitCode.NOT_RUNNING,
        )
    first = engine_snapshot.take_snapshot(context, generation, timeout_s=_PATIENCE_S)
    last = first
    if first.late or (first.metrics is not None and (first.metrics.running or 0) > 0):
        last = _watch(context, generation, first)
        if not last.unit.is_active:
            raise engine_snapshot.ended_meanwhile(generation.stack)
    pids = engine_snapshot.engine_pids(context, unit)
    passed_s = last.at_s - first.at_s
    status = procfs.parse_status(machine.read(f"/proc/{pids[0]}/status") if pids else None)
    allowed = len(CpuList.parse(status.get("Cpus_allowed_list", ""))) or None
    several_nodes = len(generation.host.cpu.numa) > 1
    return Evidence(
        stack=generation.stack,
        profile=plan.profile,
        log=read_log(
            engine_snapshot.log_lines(context, generation, time.time() - since_s, _MOST_LINES)
        ),
        before=first.metrics if passed_s else None,
        now=last.metrics,
        interval_s=passed_s or None,
        late=last.late,
        plan=plan,
        slo=slo,
        asked=generation.asked,
        cpu=engine_snapshot.cpu_time(first.threads, last.threads, passed_s, allowed)
        if passed_s
        else None,
        pages=procfs.numa_bytes(machine, pids) if several_nodes else (),
        pids=pids,
        gpus=gpu_status(machine) if plan.placement.gpus else (),
    )


def _watch(
    context: Context, generation: Generation, first: engine_snapshot.EngineSnapshot
) -> engine_snapshot.EngineSnapshot:
    """Take snapshots until a counter has moved, or until the engine counts as hanging."""
    while True:
        context.progress.progress("watch", "its counters", elapsed_s=time.monotonic() - first.at_s)
        time.sleep(_WATCH_S)
        now = engine_snapshot.take_snapshot(context, generation, timeout_s=_PATIENCE_S)
        if first.metrics is None or now.metrics is None:
            return now
        if now.at_s - first.at_s >= HANG_S or not counters_unchanged(first.metrics, now.metrics):
            return now
