"""Which cells are measured, prompts of exact length, judgement by the slo, and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, IQUEST, LATENCY, THROUGHPUT, plan, profile

from stackctl.cli.main import run
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.bench import matrix
from stackctl.observe.bench.matrix import BenchOptions, Capacity
from stackctl.observe.bench.prompts import OWN_TOKENS, Prompts
from stackctl.observe.bench.slo import slo_from_metrics, slo_results
from stackctl.values.bench import BenchCell, BenchClient, Quantiles, Workload
from stackctl.values.generation import EngineFact
from stackctl.values.metrics import EngineMetrics
from stackctl.values.profile import Slo

WIDE = Capacity(context=32768, slots=4)


def lengths(shapes: tuple[Workload, ...], *, cached: bool = False) -> set[tuple[int, int, int]]:
    return {
        (shape.prompt_tokens, shape.output_tokens, shape.concurrency)
        for shape in shapes
        if shape.cached == cached
    }


# Cells


def test_a_full_run_is_a_matrix() -> None:
    found = matrix.plan_cells(BenchOptions(), WIDE, None)
    prompts, outputs, levels = (1024, 4096, 8192), (200, 400, 800), (1, 2, 4)
    assert lengths(found) == {(p, o, n) for p in prompts for o in outputs for n in levels}
    assert lengths(found, cached=True) == {(p, 200, 1) for p in prompts}
    assert len(found) == len(set(found))


def test_lengths_are_cut_to_the_context() -> None:
    found = matrix.plan_cells(BenchOptions(), Capacity(context=8192, slots=1), None)
    assert {p for p, _, _ in lengths(found)} == {1024, 4096, 8192 - 800 - 16}
    small = matrix.plan_cells(BenchOptions(), Capacity(context=1000, slots=1), None)
    assert {p for p, _, _ in lengths(small)} == {1000 - 800 - 16}
    with pytest.raises(StackctlError, match="do not fit the context of 512") as caught:
        matrix.plan_cells(BenchOptions(), Capacity(context=512, slots=1), None)
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(StackctlError, match="a prompt of 9,000"):
        matrix.plan_cells(BenchOptions(prompts=(1000, 9000)), Capacity(context=8192, slots=1), None)


def test_the_length_of_the_slo_is_measured_too() -> None:
    slo = Slo(prompt_tokens=4640, ttft_s=5.0)
    for wish in (BenchOptions(), BenchOptions(quick=True)):
        assert 4640 in {p for p, _, _ in lengths(matrix.plan_cells(wish, WIDE, slo))}
        no_wish = matrix.plan_cells(wish, WIDE, Slo(prompt_tokens=4640, itl_ms=40))
        assert 4640 not in {p for p, _, _ in lengths(no_wish)}
    asked = matrix.plan_cells(BenchOptions(prompts=(100,)), WIDE, slo)
    assert {p for p, _, _ in lengths(asked)} == {100}


def test_prefixes_and_levels() -> None:
    cached = matrix.plan_cells(BenchOptions(prefix="cached", concurrency=(2, 3)), WIDE, None)
    assert all(shape.cached for shape in cached)
    assert {n for _, _, n in lengths(cached, cached=True)} == {2, 3}
    plain = matrix.plan_cells(BenchOptions(prefix="uncached"), WIDE, None)
    assert not any(shape.cached for shape in plain)
    six = matrix.plan_cells(BenchOptions(), Capacity(context=32768, slots=6), None)
    assert {n for _, _, n in lengths(six)} == {1, 2, 4, 6}
    quick = matrix.plan_cells(BenchOptions(quick=True), Capacity(context=32768, slots=6), None)
    assert len(quick) == 3
    assert {n for _, _, n in lengths(quick)} == {1, 6}


def test_how_many_requests() -> None:
    shape = Workload(prompt_tokens=512, output_tokens=64, concurrency=4)
    assert matrix.request_count(BenchOptions(), shape, seconds=1, cells=9) == 8
    assert matrix.request_count(BenchOptions(requests=2), shape, seconds=1, cells=9) == 4
    assert matrix.request_count(BenchOptions(requests=50), shape, seconds=1, cells=9) == 50
    one = msgspec.structs.replace(shape, concurrency=1)
    assert matrix.request_count(BenchOptions(), one, seconds=1, cells=9) == 5
    # A quick run asks an engine that is slow once, a fast one twenty times.
    quick = [
        matrix.request_count(BenchOptions(quick=True), one, seconds=s, cells=5)
        for s in (100, 2, 0.01)
    ]
    assert quick == [1, 5, 20]


# Prompts


def by_word(text: str) -> int:
    """A tokenizer that splits long words in two, as real ones do."""
    return sum(2 if len(word) > 6 else 1 for word in text.split())


def by_byte(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize("count", [by_word, by_byte])
def test_prompts_have_the_length_that_was_asked_for(count: Callable[[str], int]) -> None:
    prompts = Prompts(count, overhead=9)
    texts = [prompts.unique(tokens) for tokens in (16, 64, 1000, 4640)]
    assert [count(text) + 9 for text in texts] == [16, 64, 1000, 4640]
    assert prompts.unique(1).split()
    first = [prompts.unique(500) for _ in range(20)]
    assert len({text[:40] for text in first}) == 20


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    prompts = Prompts(by_word, overhead=9)
    prefix = prompts.prefix(1000)
    texts = [prompts.unique(1000, prefix) for _ in range(10)]
    assert {by_word(text) + 9 for text in texts} == {1000}
    assert all(text.startswith(prefix) for text in texts)
    assert len(set(texts)) == 10
    assert by_word(prefix) + 9 == 1000 - OWN_TOKENS


def test_without_a_tokenizer_lengths_are_about_right() -> None:
    prompts = Prompts(lambda _: None)
    prompts.tokens_a_word = 1.25
    assert len(prompts.unique(1000).split()) == 800
    prefix = prompts.prefix(1000)
    assert len(prompts.unique(1000, prefix).split()) == pytest.approx(800, abs=1)


# Judgement


def summary(p50: float, p95: float | None = None, p5: float | None = None) -> Quantiles:
    return Quantiles(n=5, mean=p50, p5=p5 or p50, p50=p50, p95=p95 or p50, p99=p95 or p50)


def cell(prompt: int = 4640, concurrency: int = 1, **changes: Any) -> BenchCell:
    shape = Workload(
        prompt_tokens=prompt, output_tokens=200, concurrency=concurrency,
        cached=changes.pop("cached", False),
    )  # fmt: skip
    base = BenchCell(
        shape=shape, requests=5, seconds=40.0, prompt_tokens=prompt, ttft_s=summary(3.0, 4.0),
        itl_ms=summary(38, 45), generation_tok_s=summary(26, p5=25),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


GPU = Slo(prompt_tokens=4640, ttft_s=5.0, itl_ms=50.0, min_tok_s=20.0)


def verdicts(
    cells: list[BenchCell], slo: Slo | None, slots: int = 1, **more: Any
) -> dict[str, str]:
    found = slo_results(cells, slo, Capacity(8192, slots), source="this run", **more)
    return {result.name: result.status for result in found}


def test_what_is_kept_and_what_is_missed() -> None:
    kept = {"slo-ttft": "ok", "slo-itl": "ok", "slo-speed": "ok", "requests": "ok"}
    assert verdicts([cell()], GPU) == kept
    assert verdicts([cell(), cell(ttft_s=summary(3, 5.1))], GPU) == {**kept, "slo-ttft": "fail"}
    assert verdicts([cell(itl_ms=summary(38, 51))], GPU) == {**kept, "slo-itl": "fail"}
    slow = cell(generation_tok_s=summary(26, p5=19.9))
    assert verdicts([slow], GPU) == {**kept, "slo-speed": "fail"}
    late = [cell(ttft_s=summary(3, 5.0004))]
    found = slo_results(late, GPU, Capacity(8192, 1), source="")
    (missed,) = (one for one in found if one.status == "fail")
    assert missed.actual == "p95 just over 5 s (4,640 in, 200 out, 1 at once)"
    # What is missed comes first.
    assert next(iter(verdicts([slow], GPU))) == "slo-speed"


def test_what_the_slo_does_not_promise_is_not_judged() -> None:
    long = cell(prompt=8192, ttft_s=summary(9, 9))
    assert verdicts([cell(), long], GPU)["slo-ttft"] == "ok"
    crowded = cell(concurrency=4, ttft_s=summary(20, 20), itl_ms=summary(200, 200))
    assert set(verdicts([cell(), crowded], GPU, slots=2).values()) == {"ok"}
    assert verdicts([cell(), crowded], GPU, slots=4)["slo-ttft"] == "fail"


def test_a_shorter_prompt_is_no_proof() -> None:
    assert verdicts([cell(prompt=512)], GPU)["slo-ttft"] == "warn"
    assert verdicts([cell(prompt=512, ttft_s=summary(6, 6))], GPU)["slo-ttft"] == "fail"
    assert verdicts([cell(prompt=8192)], GPU)["slo-ttft"] == "skip"
    none = cell(generation_tok_s=None, itl_ms=None)
    assert verdicts([none], GPU) == {
        "slo-ttft": "ok", "slo-itl": "skip", "slo-speed": "skip", "requests": "ok"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("context", "remedy"), [(4096, "a larger context"), (8192, "stackctl bench --prompt 4640")]
)
def test_what_does_not_fit_is_not_asked_for(context: int, remedy: str) -> None:
    found = slo_results([cell(prompt=512)], GPU, Capacity(context, 1), source="this run")
    (first,) = (result for result in found if result.name == "slo-ttft")
    assert (first.remedy or "").startswith(remedy)


def test_prefix_hits() -> None:
    wish = Slo(min_prefix_hits=0.6)
    assert verdicts([cell()], wish)["slo-prefix"] == "skip"
    assert verdicts([cell(cached=True, cached_tokens=4600.0)], wish)["slo-prefix"] == "ok"
    assert verdicts([cell(cached=True, cached_tokens=0.0)], wish)["slo-prefix"] == "fail"
    # Of prompts that are all different nothing can be found.
    assert verdicts([cell(cached_tokens=0.0)], wish)["slo-prefix"] == "skip"


def test_without_an_slo_only_failures_count() -> None:
    assert verdicts([cell()], None) == {"requests": "ok"}
    assert verdicts([cell()], Slo()) == {"requests": "ok"}
    broken = cell(failed=2, notes=("2 of 5 requests failed: HTTP 503: busy",))
    assert verdicts([broken], None) == {"requests": "fail"}
    busy = BenchClient(cpu_share=0.97, lag_ms_p99=80.0, limited=True)
    assert verdicts([cell()], None, client=busy) == {"client": "warn", "requests": "ok"}


def test_tokens_that_a_late_client_read_together_are_no_proof_of_speed() -> None:
    def found(lag: float, limited: bool, **changes: Any) -> str:
        client = BenchClient(cpu_share=0.3, lag_ms_p99=lag, limited=limited)
        return verdicts([cell(**changes)], GPU, client=client)["slo-itl"]

    together = {"itl_ms": summary(0.001)}
    assert found(80.0, True, **together) == "warn"
    # Late by less than what is judged, or not at all, or missed in spite of it.
    assert found(4.5, True, **together) == found(80.0, False, **together) == "ok"
    assert found(80.0, True, itl_ms=summary(38, 51)) == "fail"


# What an engine's own metrics say


def told(name: str, text: str) -> EngineMetrics:
    return engine(name).parse_metrics({"/metrics": text}, ())


def histogram(*buckets: tuple[str, int]) -> str:
    name = "vllm:time_to_first_token_seconds"
    rows = [f'{name}_bucket{{engine="0",le="{bound}"}} {count}' for bound, count in buckets]
    return "\n".join([*rows, f"{name}_count {buckets[-1][1]}", f"{name}_sum 99.0", ""])


def test_histograms_judge_where_the_engine_has_them() -> None:
    text = histogram(("1.0", 0), ("2.0", 50), ("4.0", 100), ("+Inf", 100))
    text += 'vllm:prefix_cache_queries_total{engine="0"} 1000.0\n'
    text += 'vllm:prefix_cache_hits_total{engine="0"} 450.0\n'
    slo = Slo(ttft_s=3.5, itl_ms=50, min_prefix_hits=0.6)
    found = {result.name: result for result in slo_from_metrics(told("vllm", text), slo)}
    assert set(found) == {"slo-ttft-engine", "slo-prefix-engine"}
    first = found["slo-ttft-engine"]
    assert (first.status, first.actual, first.expected) == (
        "fail",
        "p95 3.8 s",
        "p95 at most 3.5 s",
    )
    assert found["slo-prefix-engine"].actual == "45 %"
    assert "100 values since it started" in (first.evidence or "")
    # Five are no 95th percentile.
    assert slo_from_metrics(told("vllm", histogram(("1.0", 5), ("+Inf", 5))), Slo(ttft_s=0.5)) == []


def test_llamacpp_counts_cached_tokens_only() -> None:
    text = "llamacpp:prompt_tokens_total 400\nllamacpp:prompt_tokens_cached_total 600\n"
    slo = Slo(ttft_s=1, min_prefix_hits=0.6)
    (found,) = slo_from_metrics(told("llama.cpp", text), slo)
    assert (found.name, found.status, found.actual) == ("slo-prefix-engine", "ok", "60 %")
    assert slo_from_metrics(told("llama.cpp", ""), slo) == []


# What a stack serves


@pytest.mark.parametrize(
    ("wish", "slots"), [(LATENCY, 1), (THROUGHPUT, 4), (profile(THROUGHPUT, concurrency=3), 3)]
)
def test_limits_of_a_plan(wish: Any, slots: int) -> None:
    from stackctl.observe.bench.matrix import serving_capacity

    found = serving_capacity(plan(EPYC, IQUEST, wish), ())
    assert found.slots == slots
    assert found.context == pytest.approx(8192, abs=256)


def test_limits_that_the_engine_chose() -> None:
    from stackctl.observe.bench.matrix import serving_capacity

    wish = profile(LATENCY, engine_args={"parallel": (-1,), "ctx-size": (0,)})
    said = (EngineFact(name="slots", value="4"), EngineFact(name="context", value="4096"))
    found = serving_capacity(plan(EPYC, IQUEST, wish), said)
    assert (found.context, found.slots) == (4096, 4)


# The profile's key


@pytest.mark.parametrize("value", ["60", "0", "-0.5", "often"])
def test_prefix_hits_are_a_share(
    value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: cpu\nslo: {{min_prefix_hits: {value}}}\n")
    assert run(["profiles", "show", "mine", "--profiles", str(tmp_path)]) == ExitCode.USAGE
    assert "min_prefix_hits" in capsys.readouterr().err
    path.write_text("extends: cpu\nslo: {min_prefix_hits: 0.6}\n")
    assert run(["profiles", "show", "mine", "--profiles", str(tmp_path)]) == ExitCode.OK


# The command line


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for key in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(key, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["bench"], 3, "no stack is up", "stackctl up PROFILE"),
        (["bench", "--quick"], 3, "no stack is up", "stackctl up PROFILE"),
        (["bench", "cpu"], 4, "no stack named cpu", "none is up"),
        (["bench", "run", "list"], 4, "no stack named list", "stackctl bench list"),
        (["bench", "--json", "list"], 4, "no stack named list", "stackctl bench list"),
        (["bench", "--output", "few"], 2, "'few' is not a number of tokens", "8192"),
        (["bench", "--concurrency", "0"], 2, "must be at least 1", "1,2,4"),
        (["bench", "--prefix", "none"], 2, "Invalid value for '--prefix'", "bench run --help"),
        (["bench", "show", "7"], 4, "there is no bench 7", "stackctl bench"),
        (["bench", "show", "x"], 2, "'x' is not a valid integer", "show --help"),
        (["bench", "compare", "1"], 2, "missing B", "compare --help"),
        (["check", "--slo"], 3, "no stack is up", "stackctl up PROFILE"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], code: int, message: str, hint: str, home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(["--user", *words]) == code
    told = capsys.readouterr()
    text = told.out + told.err
    assert message in text and hint in text
    assert "bug" not in text
    assert not (home / "stackctl" / "benches.sqlite").exists()


def test_the_list_may_be_empty(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--user", "bench", "list"]) == ExitCode.OK
    assert "nothing was measured yet" in capsys.readouterr().err
    assert run(["--user", "bench", "list", "--json"]) == ExitCode.OK
    assert '"runs": []' in capsys.readouterr().out
