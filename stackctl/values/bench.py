"""Measurements of running stacks: ``stackctl.bench/1``, their list and their comparison."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.generation import Generation
from stackctl.values.profile import Slo
from stackctl.values.result import Result

Word = Literal["better", "worse", "no difference", "too few"]


class Quantiles(Value, frozen=True, kw_only=True):
    """A sample in short: ``n`` values, their mean, and quantiles by linear interpolation."""

    n: int
    mean: float
    p5: float
    p50: float
    p95: float
    p99: float


class Shape(Value, frozen=True, kw_only=True):
    """What one cell of the matrix asks for: tokens of prompt and of answer, requests at the same
    time, and whether the prompts share a prefix that was sent before."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int = 1
    cached: bool = False

    @property
    def alone(self) -> bool:
        """One request at a time, with no cache to help: what the speed of a request is told by."""
        return self.concurrency == 1 and not self.cached


class Cell(Value, frozen=True, kw_only=True):
    """What one cell measured, as the client saw it.

    ``ttft_s`` ends at the first piece with content, reasoning or a tool call; ``itl_ms`` are the
    gaps between pieces; ``generation_tok_s`` counts a request's tokens after its first piece, where
    it has 64 or more of them; ``prompt_tok_s`` is tokens that were not cached, by TTFT;
    ``output_tok_s`` is all requests together, over the whole time. ``goodput`` is the share of
    requests within the SLO; None without one. ``prompt_tokens``, ``output_tokens`` and
    ``cached_tokens`` are means of what the server counted. ``performance_factor`` is the median
    generation tok/s over billions of parameters. ``notes`` say what to know about the figures.
    """

    shape: Shape
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


class Client(Value, frozen=True, kw_only=True):
    """How the measuring client did: its share of one processor, and how late it read what had
    arrived. ``limited``: it, not the engine, may have set the pace."""

    cpu_share: float
    lag_ms_p99: float | None = None
    limited: bool = False


class Sample(Value, frozen=True, kw_only=True):
    """One request of a cell (its number in the run): ``began_s`` since the run began, and the gaps
    between its pieces. Tokens as the server counted them."""

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
    """One run. ``results`` judge it by the profile's SLO, most important first; ``complete`` is
    False for one that was interrupted; ``lengths`` says who made prompts as long as asked: the
    engine's tokenizer, or an estimate. ``id`` is None until it is stored. ``box`` is the machine
    that it was measured on from another one, as ``--host`` named it; None: from where it runs."""

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
    client: Client | None = None
    cells: tuple[Cell, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether any request of it was: one that failed says nothing of speed."""
        return any(cell.requests > cell.failed for cell in self.cells)


class BenchTarget(Value, frozen=True, kw_only=True):
    """What another machine has to know to measure a stack of this one."""

    schema: Literal["stackctl.bench-target/1"] = "stackctl.bench-target/1"
    generation: Generation
    url: str
    slo: Slo | None = None


class BenchEntry(Value, frozen=True, kw_only=True):
    """A stored run in the list of them."""

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


class Difference(Value, frozen=True, kw_only=True):
    """One figure of a cell in two runs: medians, and by what factor the second is larger, with the
    95 % interval. ``word`` is the verdict."""

    shape: Shape
    figure: Literal["ttft_s", "generation_tok_s", "e2e_s"]
    before: float
    after: float
    n: tuple[int, int]
    ratio: tuple[float, float, float] | None = None
    word: Word


class BenchComparison(Value, frozen=True, kw_only=True):
    """Two runs, cell by cell. ``differs`` is what else is not the same in them: model, image, plan
    or machine."""

    schema: Literal["stackctl.bench-comparison/1"] = "stackctl.bench-comparison/1"
    before: int
    after: int
    differs: tuple[str, ...] = ()
    only_before: tuple[Shape, ...] = ()
    only_after: tuple[Shape, ...] = ()
    differences: tuple[Difference, ...] = ()
