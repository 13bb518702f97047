"""Measurements of running stacks: ``stackctl.bench/1``, their list and their comparison."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.generation import Generation
from stackctl.values.profile import Slo
from stackctl.values.result import Result

ComparisonVerdict = Literal["better", "worse", "no difference", "too few"]


class Quantiles(Value, frozen=True, kw_only=True):
    """A summary of ``n`` values: their mean, and quantiles by linear interpolation."""

    n: int
    mean: float
    p5: float
    p50: float
    p95: float
    p99: float


class Workload(Value, frozen=True, kw_only=True):
    """The workload of one cell: tokens of a prompt and of an answer, and requests at the same time.

    ``cached``: the prompts share a prefix that was sent before.
    """

    prompt_tokens: int
    output_tokens: int
    concurrency: int = 1
    cached: bool = False

    @property
    def is_single_uncached(self) -> bool:
        """Return True for one request at a time without a cached prefix.

        The speed of a single request is reported from such cells.
        """
        return self.concurrency == 1 and not self.cached


class BenchCell(Value, frozen=True, kw_only=True):
    """The results of one cell, measured by the client.

    ``ttft_s`` ends at the first piece with content, reasoning or a tool call. ``itl_ms`` are the
    gaps between pieces. ``generation_tok_s`` is the speed after the first piece, of requests with
    64 tokens or more. ``prompt_tok_s`` is prompt tokens that were not cached, divided by TTFT.
    ``output_tok_s`` is the tokens of all requests, divided by the time of the cell. ``goodput`` is
    the share of requests that met the SLO (None: no SLO). ``prompt_tokens``, ``output_tokens`` and
    ``cached_tokens`` are means of the server's counts. ``performance_factor`` is the median
    generation tok/s divided by billions of parameters. ``notes`` are caveats on the figures.
    """

    shape: Workload
    requests: int
    failed: int = 0
    seconds: float
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    cached_tokens: float | None = None
    ttft_s: Quantiles | None = None
    itl_ms: Quantiles | None = None
    generation_tok_s: Quantiles | None = None
    prompt_tok_s: Quantiles | None = None
    e2e_s: Quantiles | None = None
    output_tok_s: float | None = None
    goodput: float | None = None
    performance_factor: float | None = None
    notes: tuple[str, ...] = ()


class BenchClient(Value, frozen=True, kw_only=True):
    """The load of the measuring client: its share of one CPU, and its delay in reading data.

    ``limited``: the client, not the engine, may have set the pace.
    """

    cpu_share: float
    lag_ms_p99: float | None = None
    limited: bool = False


class RequestSample(Value, frozen=True, kw_only=True):
    """One request. ``cell`` is the index of its cell in the run.

    ``began_s`` counts from the start of the run, ``gaps_ms`` are the times between pieces. Tokens
    are the server's counts.
    """

    cell: int
    began_s: float
    e2e_s: float
    ttft_s: float | None = None
    gaps_ms: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    generation_tok_s: float | None = None
    error: str | None = None


class BenchReport(Value, frozen=True, kw_only=True):
    """One run of ``stackctl bench``. ``results`` compare it with the profile's SLO, worst first.

    ``complete`` is False for an interrupted run. ``lengths`` is the source of the prompt lengths:
    the engine's tokenizer, or an estimate. ``id`` is None until the run is stored. ``box`` is the
    machine of the stack, as ``--host`` named it (None: the stack ran on the measuring machine).
    """

    schema: Literal["stackctl.bench/1"] = "stackctl.bench/1"
    results: tuple[Result, ...] = ()
    id: int | None = None
    stack: str
    box: str | None = None
    generation: int
    when: str
    seconds: float
    complete: bool = True
    tool: Literal["stackctl", "aiperf"] = "stackctl"
    profile: str
    objective: str
    engine: str
    image_id: str
    model: str
    parameters: int | None = None
    lengths: Literal["tokenizer", "estimated"] = "tokenizer"
    slo: Slo | None = None
    client: BenchClient | None = None
    cells: tuple[BenchCell, ...] = ()

    @property
    def has_answers(self) -> bool:
        """Return True if at least one request was answered."""
        return any(cell.requests > cell.failed for cell in self.cells)


class BenchTarget(Value, frozen=True, kw_only=True):
    """The data that another machine needs to measure a stack of this one."""

    schema: Literal["stackctl.bench-target/1"] = "stackctl.bench-target/1"
    generation: Generation
    url: str
    slo: Slo | None = None


class BenchEntry(Value, frozen=True, kw_only=True):
    """A stored run, as a row of the list of runs."""

    id: int
    stack: str
    box: str | None = None
    generation: int
    when: str
    tool: str
    model: str
    objective: str
    seconds: float
    complete: bool
    cells: int
    generation_tok_s: float | None = None


class BenchList(Value, frozen=True, kw_only=True):
    """The stored runs, newest first."""

    schema: Literal["stackctl.benches/1"] = "stackctl.benches/1"
    runs: tuple[BenchEntry, ...]


class CellDifference(Value, frozen=True, kw_only=True):
    """One figure of a cell in two runs: the medians, and the number of values of each run.

    ``ratio`` is after divided by before, with its 95 % interval: (estimate, low, high). ``word`` is
    the verdict.
    """

    shape: Workload
    figure: Literal["ttft_s", "generation_tok_s", "e2e_s"]
    before: float
    after: float
    n: tuple[int, int]
    ratio: tuple[float, float, float] | None = None
    word: ComparisonVerdict


class BenchComparison(Value, frozen=True, kw_only=True):
    """A comparison of two runs, cell by cell.

    ``differs`` lists other differences between the runs: model, image, plan or machine.
    """

    schema: Literal["stackctl.bench-comparison/1"] = "stackctl.bench-comparison/1"
    before: int
    after: int
    differs: tuple[str, ...] = ()
    only_before: tuple[Workload, ...] = ()
    only_after: tuple[Workload, ...] = ()
    differences: tuple[CellDifference, ...] = ()
