"""The measurement of a running stack: a warm-up, then cell by cell, until an interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stackctl.deploy import proxy
from stackctl.deploy.context import Context, Progress
from stackctl.deploy.stack_state import installed_number, not_running
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import http
from stackctl.machine.streaming_client import StreamingClient
from stackctl.observe.bench import cell_stats, load_generator, matrix
from stackctl.observe.bench.aiperf import Aiperf
from stackctl.observe.bench.load_generator import CellRun, StreamedCompletion
from stackctl.observe.bench.prompts import OWN_TOKENS, Prompts
from stackctl.observe.bench.slo import slo_results, workload_text
from stackctl.observe.bench.statistics import quantile
from stackctl.observe.status import stack_url
from stackctl.quantity import format_duration
from stackctl.state.generations import utc_now
from stackctl.values.bench import BenchClient, BenchReport, RequestSample, Workload
from stackctl.values.generation import Generation
from stackctl.values.profile import Slo

#: The warm-up: a first request, whose time is ignored, and a second one, which gives the pace.
_COLD, _PACE = (
    Workload(prompt_tokens=64, output_tokens=8),
    Workload(prompt_tokens=256, output_tokens=64),
)
#: The client is the limit if it uses a larger share of a CPU than _BUSY, or if its delay in reading
#: is more than _LATE times the gap between tokens.
_BUSY, _LATE = 0.7, 1.0
_TOKENIZER_S = 30


@dataclass(frozen=True)
class BenchEndpoint:
    """The addresses of a measured stack.

    ``url`` is the address for clients, ``engine_url`` that of the engine, ``key`` the API key for
    the front door (None: no key). ``current`` returns the number of the installed generation (None:
    no generation). ``box`` is the machine of the stack if it is another one, and ``command`` the
    beginning of a command for it.
    """

    url: str
    engine_url: str
    key: str | None
    current: Callable[[], int | None]
    box: str | None = None
    command: str = "stackctl"


def local_endpoint(context: Context, generation: Generation) -> BenchEndpoint:
    """Return the target for a stack of this machine."""
    return BenchEndpoint(
        url=stack_url(generation),
        engine_url=endpoint.base_url(generation.plan.engine_listen_port),
        key=proxy.client_key(context, generation),
        current=lambda: installed_number(context, generation.stack),
    )


def require_running(context: Context, generation: Generation) -> None:
    """Check that a stack can be measured, and warn if its engine has other requests.

    Raises:
        StackctlError: exit 3 if the stack does not run or is not ready; 1 if its health check
        fails.
    """
    stack, port = generation.stack, generation.plan.engine_listen_port
    engine = find_engine(generation.plan.engine)
    state = context.systemd.state(generation.units.service).active
    if state != "active":
        raise not_running(stack)
    alive = endpoint.liveness(port, engine.health_path)
    if alive != "ready":
        raise StackctlError(
            f"{stack} is not ready: {alive}",
            hint=f"stackctl status {stack}",
            exit_code=ExitCode.FAILED if alive == "failing" else ExitCode.NOT_RUNNING,
        )
    if endpoint.is_busy(port, engine, generation.plan.argv):
        context.progress.warn(
            f"{stack} is serving other requests: the results are those of a shared engine"
        )


@dataclass
class _Pace:
    """The expected time of one request, corrected by the times of the measured cells."""

    prefill_tok_s: float
    decode_tok_s: float
    correction: float = 1.0

    def seconds(self, workload: Workload) -> float:
        """Return the seconds of one request while the others of its cell run."""
        computed = OWN_TOKENS if workload.cached else workload.prompt_tokens
        prompt = computed * workload.concurrency / self.prefill_tok_s
        return (prompt + workload.output_tokens / self.decode_tok_s) * self.correction

    def cell_seconds(self, cell: CellRun) -> float:
        """Return the seconds of a cell."""
        return self.seconds(cell.shape) * cell.planned / cell.shape.concurrency


class Bench:
    """A measurement of one generation."""

    def __init__(
        self,
        progress: Progress,
        generation: Generation,
        options: matrix.BenchOptions,
        *,
        site: BenchEndpoint,
        slo: Slo | None,
        timeout_s: float,
        aiperf: str | None = None,
    ) -> None:
        """Prepare the cells. One request may take ``timeout_s`` seconds.

        ``aiperf`` is the path of aiperf, which then sends the requests (None: stackctl sends them).

        Raises:
            StackctlError: exit 2 if a length does not fit the context.
        """
        self._report, self._wish, self._site = progress, options, site
        self._generation, self._plan = generation, generation.plan
        self._slo = slo if slo is not None and slo.has_objectives else None
        self._timeout_s = timeout_s
        self._aiperf = Aiperf(aiperf, site.url, site.key) if aiperf else None
        self._limits = matrix.serving_capacity(generation.plan, generation.outcome.report)
        self._shapes = matrix.plan_cells(options, self._limits, self._slo)
        self._engine = find_engine(self._plan.engine)
        self._cells: list[CellRun] = []
        self._began = time.perf_counter()
        self._prompts = Prompts(self._count)
        self._tokenizer = True
        self._streams = StreamingClient(site.url, key=site.key)

    def measure(self) -> bool:
        """Measure the cells, until an interrupt; return True if there was one.

        Raises:
            StackctlError: the stack does not answer.
            KeyboardInterrupt: the interrupt came before a request was answered.
        """
        with self._streams:
            try:
                self._measure()
            except KeyboardInterrupt:
                self._cells = [cell for cell in self._cells if cell.replies]
                if not any(len(cell.replies) > len(cell.failed) for cell in self._cells):
                    raise
                return True
        return False

    def _measure(self) -> None:
        pace = self._warm_up()
        planned = [CellRun(workload, self._requests(workload, pace)) for workload in self._shapes]
        expected = format_duration(sum(map(pace.cell_seconds, planned)))
        requests = sum(cell.planned for cell in planned)
        self._report.step("bench", f"{len(planned)} cells, {requests} requests, about {expected}")
        level = 1
        for number, cell in enumerate(planned):
            rest = sum(map(pace.cell_seconds, planned[number + 1 :]))
            try:
                if cell.shape.concurrency > level:
                    level = cell.shape.concurrency
                    # Some engines prepare for a number of requests at once, the first time.
                    text = self._prompts.unique(_COLD.prompt_tokens)
                    self._send(text, _COLD.output_tokens, level)
                texts = self._texts(cell.shape, cell.planned)
                self._cells.append(cell)
                self._measure_cell(cell, texts, pace, rest)
            except StackctlError as error:
                # If the engine ends in the middle, the measured cells are kept.
                self._cells = [cell for cell in self._cells if cell.replies]
                if not self._cells:
                    raise
                self._report.warn(f"stopped: {error.message}", error.hint)
                return
            if cell.replies and len(cell.failed) == len(cell.replies):
                self._report.warn(f"stopped: {cell.failed[0].error}")
                return
            took, thought = cell.ended - cell.began, pace.cell_seconds(cell)
            if took > 0 and thought > 0:
                pace.correction *= (took / thought) ** 0.5

    def _measure_cell(self, cell: CellRun, texts: Sequence[str], pace: _Pace, rest: float) -> None:
        head = f"{len(self._cells)} of {len(self._shapes)}: {workload_text(cell.shape)}"
        whole = pace.cell_seconds(cell)

        def tick() -> None:
            here = max(0.0, whole - (time.perf_counter() - cell.began))
            self._report.progress(
                "bench", f"{head}  ·  {format_duration(here + rest)} left",
                elapsed_s=time.perf_counter() - self._began,
            )  # fmt: skip

        cell.began = time.perf_counter()
        tick()
        name = self._plan.served_name
        if self._aiperf is not None:
            most = self._timeout_s * (cell.planned / cell.shape.concurrency + 1)
            self._aiperf.measure(cell, texts, name, timeout_s=most)
            return
        tokens = cell.shape.output_tokens
        bodies = [load_generator.request_body(name, text, tokens) for text in texts]
        load_generator.run_cell(self._streams, cell, bodies, timeout_s=self._timeout_s, tick=tick)

    def _requests(self, workload: Workload, pace: _Pace) -> int:
        seconds = pace.seconds(workload)
        return matrix.request_count(self._wish, workload, seconds=seconds, cells=len(self._shapes))

    def _warm_up(self) -> _Pace:
        """Send two requests: the first shows the chat template's tokens, the second the speed."""
        self._report.progress("bench", "warm-up")
        text = self._prompts.unique(_COLD.prompt_tokens)
        counted = self._count(text)
        first = self._ask(text, _COLD.output_tokens)
        if first.prompt_tokens is not None:
            if counted is None:
                self._prompts.tokens_a_word = first.prompt_tokens / len(text.split())
            else:
                self._prompts.overhead = max(0, first.prompt_tokens - counted)
        second = self._prompts.unique(_PACE.prompt_tokens)
        completion = self._ask(second, _PACE.output_tokens)
        if counted is None and completion.prompt_tokens and first.prompt_tokens:
            # Two lengths separate the tokens per word from those of the chat template.
            self._learn(first.prompt_tokens, completion.prompt_tokens, text)
        ttft = completion.ttft_s or completion.ended_s
        speed = cell_stats.generation_tok_s(completion)
        return _Pace(
            prefill_tok_s=(completion.prompt_tokens or _PACE.prompt_tokens) / max(ttft, 1e-3),
            decode_tok_s=speed or _PACE.output_tokens / max(completion.ended_s, 1e-3),
        )

    def _learn(self, short: int, long: int, text: str) -> None:
        words = len(text.split())
        more = max(1, round(_PACE.prompt_tokens / self._prompts.tokens_a_word)) - words
        if more > 0 and long > short:
            self._prompts.tokens_a_word = (long - short) / more
            self._prompts.overhead = max(0, round(short - words * self._prompts.tokens_a_word))

    def _send(
        self, text: str, output_tokens: int, concurrency: int = 1
    ) -> list[StreamedCompletion]:
        """Send a prompt once, or several times at once, outside of the measured cells."""
        workload = Workload(prompt_tokens=1, output_tokens=1, concurrency=concurrency)
        cell = CellRun(workload, concurrency)
        body = load_generator.request_body(self._plan.served_name, text, output_tokens)
        bodies, timeout_s = [body] * concurrency, self._timeout_s
        load_generator.run_cell(self._streams, cell, bodies, timeout_s=timeout_s, tick=lambda: None)
        return cell.replies

    def _ask(self, text: str, output_tokens: int) -> StreamedCompletion:
        (completion,) = self._send(text, output_tokens)
        if completion.error is not None:
            raise StackctlError(
                f"{self._generation.stack} does not answer: {completion.error}",
                hint=f"{self._site.command} check {self._generation.stack}",
            )
        return completion

    def _texts(self, workload: Workload, count: int) -> list[str]:
        self._report.progress("bench", f"making {count} prompts")
        tokens = workload.prompt_tokens
        prefix = self._prompts.prefix(tokens) if workload.cached else ""
        if prefix:
            # This request puts the prefix into the cache.
            self._ask(self._prompts.unique(tokens, prefix), 1)
        return [self._prompts.unique(tokens, prefix) for _ in range(count)]

    def _count(self, text: str) -> int | None:
        """Return the tokens of a text by the engine's tokenizer; None if it has no endpoint."""
        if not self._tokenizer:
            return None
        path, body = self._engine.tokenize_request(text, self._plan.served_name)
        answer = http.post(self._site.engine_url + path, body, timeout_s=_TOKENIZER_S)
        if isinstance(answer, http.HttpAnswer) and answer.status == 200:
            tokens = answer.json.get("tokens") if isinstance(answer.json, dict) else None
            if isinstance(tokens, list):
                return len(tokens)
        self._tokenizer = False
        return None

    def result(self, *, interrupted: bool) -> tuple[BenchReport, tuple[RequestSample, ...]]:
        """Return the report, and the requests behind it.

        Raises:
            StackctlError: another generation replaced the measured one.
        """
        plan, generation = self._plan, self._generation
        current = self._site.current()
        # If the stack was taken down meanwhile, its figures are valid until then.
        if current not in (None, generation.number):
            raise StackctlError(
                f"generation {generation.number} was replaced by {current} while it "
                "was measured: the figures are of neither",
                hint=f"{self._site.command} bench {generation.stack}",
            )
        parameters = plan.model.parameters
        cells = tuple(
            cell_stats.summarize_cell(cell, slo=self._slo, parameters=parameters)
            for cell in self._cells
        )
        samples = tuple(
            cell_stats.to_sample(completion, number, self._began)
            for number, cell in enumerate(self._cells)
            for completion in cell.replies
        )
        gaps = [cell.itl_ms.p50 for cell in cells if cell.itl_ms]
        client = None if self._aiperf else _client(self._streams, min(gaps, default=None))
        done = len(self._cells) == len(self._shapes)
        whole = done and all(len(cell.replies) == cell.planned for cell in self._cells)
        report = BenchReport(
            results=slo_results(cells, self._slo, self._limits, source="this run", client=client),
            stack=generation.stack,
            box=self._site.box,
            generation=generation.number,
            when=utc_now(),
            seconds=time.perf_counter() - self._began,
            complete=whole and not interrupted,
            tool="aiperf" if self._aiperf else "stackctl",
            profile=plan.profile,
            objective=plan.objective,
            engine=plan.engine,
            image_id=generation.image_id,
            model=plan.model.name or plan.served_name,
            parameters=parameters,
            lengths="tokenizer" if self._tokenizer else "estimated",
            slo=self._slo,
            client=client,
            cells=cells,
        )
        return report, samples


def _client(client: StreamingClient, gap_ms: float | None) -> BenchClient:
    """Return the load of the client: its CPU time, and its delay in reading data.

    Arrival times are the kernel's timestamps, so a delay does no harm until pieces wait for each
    other.
    """
    lag = quantile(client.lags, 0.99) * 1000 if client.lags else None
    late = lag is not None and gap_ms is not None and lag > _LATE * gap_ms
    share = client.cpu_share
    return BenchClient(cpu_share=share, lag_ms_p99=lag, limited=late or share > _BUSY)
