"""The present speed and load of stacks, as repeated samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_generation
from stackctl.errors import StackctlError
from stackctl.observe import engine_snapshot
from stackctl.observe.metrics import latencies_in_log
from stackctl.probe.nvml import gpu_status
from stackctl.values.diagnosis import GpuStatus
from stackctl.values.generation import Generation
from stackctl.values.metrics import EngineMetrics, Histogram

#: For engines that do not report latencies, the log of so many seconds is read.
_LOG_S = 600.0
_MOST_LINES = 2000
#: Seconds that an engine has to report its metrics. It may need longer during a long prompt; the
#: screen must not wait for it.
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class TopRow:
    """One sample of one stack; None: unknown.

    ``in_tok_s`` and ``out_tok_s`` are averages since the previous sample. ``cpu`` is in CPUs,
    ``gpu`` is the utilisation (0 to 1) of the busiest of its GPUs. ``ttft_s`` and ``itl_s`` are
    95th percentiles. ``estimated`` names the derived numbers. ``note`` is the reason for missing
    numbers.
    """

    stack: str
    in_tok_s: float | None = None
    out_tok_s: float | None = None
    running: int | None = None
    waiting: int | None = None
    kv: float | None = None
    hits: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    cpu: float | None = None
    gpu: float | None = None
    estimated: tuple[str, ...] = ()
    note: str | None = None


@dataclass
class TopSampler:
    """A sampler of stacks, which keeps the previous sample of each."""

    context: Context
    _before: dict[str, tuple[int, engine_snapshot.EngineSnapshot]] = field(default_factory=dict)

    def sample(self, stacks: Sequence[str]) -> tuple[TopRow, ...]:
        """Take a sample; return one row for each stack."""
        gpus: tuple[GpuStatus, ...] | None = None
        rows = []
        for stack in stacks:
            try:
                generation = installed_generation(self.context, stack)
                if gpus is None and generation.plan.placement.gpus:
                    gpus = gpu_status(self.context.machine)
                rows.append(self._row(generation, gpus or ()))
            except StackctlError as error:
                rows.append(TopRow(stack=stack, note=error.message))
        return tuple(rows)

    def _row(self, generation: Generation, gpus: Sequence[GpuStatus]) -> TopRow:
        stack = generation.stack
        number, before = self._before.get(stack, (0, None))
        now = engine_snapshot.take_snapshot(
            self.context, generation, timeout_s=_PATIENCE_S, threads_too=False
        )
        if number != generation.number:
            before = None
        self._before[stack] = (generation.number, now)
        wanted = set(generation.plan.placement.gpus)
        uses = [g.utilization for g in gpus if str(g.index) in wanted and g.utilization is not None]
        row = TopRow(stack=stack, cpu=_cpu(before, now), gpu=max(uses, default=None))
        if not now.unit.is_active:
            return TopRow(stack=stack, note=now.unit.active or "not running")
        if now.metrics is None:
            note = "it does not tell its numbers" if now.late else "does not answer"
            return dataclasses.replace(row, note=note)
        earlier = (before.metrics if before else None) or EngineMetrics()
        passed_s = now.at_s - before.at_s if before else 0.0
        return self._numbers(row, generation, now.metrics, earlier, passed_s)

    def _numbers(
        self,
        row: TopRow,
        generation: Generation,
        seen: EngineMetrics,
        earlier: EngineMetrics,
        passed_s: float,
    ) -> TopRow:
        """Return the row with the engine's numbers; ``earlier`` are those of the last sample."""
        estimated = list(seen.estimates)
        ttft, itl = _recent(seen.ttft, earlier.ttft), _recent(seen.itl, earlier.itl)
        if seen.ttft is None:
            since = time.time() - _LOG_S
            ttft, itl = latencies_in_log(self.context, generation, since, _MOST_LINES)
            estimated += ["ttft_s", "itl_s"]
        queries, hits = seen.prefix_queries, seen.prefix_hits
        return dataclasses.replace(
            row,
            in_tok_s=_rate(seen.prompt_tokens, earlier.prompt_tokens, passed_s),
            out_tok_s=_rate(seen.generation_tokens, earlier.generation_tokens, passed_s),
            running=seen.running,
            waiting=seen.waiting,
            kv=seen.kv_usage,
            hits=hits / queries if queries and hits is not None else None,
            ttft_s=ttft.quantile(0.95) if ttft else None,
            itl_s=itl.quantile(0.95) if itl else None,
            estimated=tuple(estimated),
        )


def _recent(now: Histogram | None, before: Histogram | None) -> Histogram | None:
    """Return the values since the previous sample, or all values if there are no new ones."""
    if now is None:
        return None
    since = now.since(before)
    return since if since.count else now


def _rate(now: float | None, before: float | None, passed_s: float) -> float | None:
    """Return the increase of a counter per second; 0 if the engine was restarted."""
    if now is None or before is None or passed_s <= 0:
        return None
    return max(0.0, now - before) / passed_s


def _cpu(
    before: engine_snapshot.EngineSnapshot | None, now: engine_snapshot.EngineSnapshot
) -> float | None:
    """Return the average number of CPUs that the engine used since the previous sample."""
    done = None if before is None else engine_snapshot.work_between(before, now)
    if done is None or done.cpu_s is None or done.interval_s <= 0:
        return None
    return done.cpu_s / done.interval_s
