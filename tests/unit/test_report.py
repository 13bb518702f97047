"""The page about a stack: what it shows, what it never holds, and what it never overwrites."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from samples import LATENCY, THROUGHPUT, plan, served

from stackctl.errors import StackctlError
from stackctl.observe.report import charts
from stackctl.observe.report.page import page_parts, render_page, write_page
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, RequestSample, Workload
from stackctl.values.generation import EngineFact, Generation, Outcome
from stackctl.values.plan import Prediction, PromptTime
from stackctl.values.result import Result

EXPECTED = Prediction(
    decode_tok_s=(20.0, 30.0),
    prefill_tok_s=(900.0, 1500.0),
    ttft_s=PromptTime(prompt_tokens=4000, range=(1.0, 2.0)),
    performance_factor=(0.5, 0.75),
    basis="estimated",
)


def generation(number: int = 3) -> Generation:
    planned = msgspec.structs.replace(plan(wish=LATENCY), prediction=EXPECTED)
    outcome = Outcome(
        state="ready",
        changed="2026-11-28T12:00:05Z",
        report=(EngineFact(name="kv_cache_tokens", value="203,120"),),
    )
    return served(planned, number, outcome=outcome)


def quantiles(middle: float, spread: float = 0.1) -> Quantiles:
    return Quantiles(
        n=8,
        mean=middle,
        p5=middle * (1 - spread),
        p50=middle,
        p95=middle * (1 + spread),
        p99=middle * (1 + 2 * spread),
    )


def cell(prompt: int, output: int, concurrency: int, *, speed: float = 27.0) -> BenchCell:
    each = speed / (1 + 0.1 * (concurrency - 1))
    first = prompt / 1200 * (1 + 0.2 * (concurrency - 1))
    return BenchCell(
        shape=Workload(prompt_tokens=prompt, output_tokens=output, concurrency=concurrency),
        requests=8 * concurrency,
        seconds=output / each,
        prompt_tokens=float(prompt),
        output_tokens=float(output),
        cached_tokens=0.0,
        ttft_s=quantiles(first),
        itl_ms=quantiles(1000 / each),
        generation_tok_s=quantiles(each, 0.03),
        prompt_tok_s=quantiles(1200.0),
        e2e_s=quantiles(first + output / each),
        output_tok_s=each * concurrency,
        goodput=0.95,
        performance_factor=each / 40,
        notes=("two requests waited for a slot",),
    )


def run(
    number: int, *, generation: int = 3, speed: float = 27.0, objective: str = "latency"
) -> BenchReport:
    shapes = [(p, o, 1) for p in (1000, 4000, 8000) for o in (200, 400, 800)]
    shapes += [(1000, 200, n) for n in (2, 4, 8)]
    return BenchReport(
        id=number,
        results=(
            Result(name="slo-ttft", status="fail", expected="p95 5 s", actual="p95 7.3 s at 8,000"),
            Result(name="slo-itl", status="ok", expected="p95 50 ms", actual="p95 41 ms"),
        ),
        stack="cpu",
        generation=generation,
        when="2026-11-28T12:30:00Z",
        seconds=340.0,
        profile="gpu-nvfp4",
        objective=objective,
        engine="vllm",
        image_id="0" * 64,
        model="iquest-coder-40b",
        parameters=40_000_000_000,
        cells=tuple(cell(*shape, speed=speed) for shape in shapes),
    )


def samples() -> tuple[RequestSample, ...]:
    chance = random.Random(7)
    return tuple(
        RequestSample(
            cell=number % 9,
            began_s=float(number),
            e2e_s=8.0,
            ttft_s=0.8 + chance.expovariate(4),
            gaps_ms=tuple(35 + chance.gauss(2, 1.5) for _ in range(60)),
        )
        for number in range(80)
    )


def page(runs: int = 3) -> str:
    stored = [
        run(number, generation=number, speed=21.0 + 2 * number,
            objective="throughput" if number == 2 else "latency")
        for number in range(1, runs + 1)
    ]  # fmt: skip
    latest = stored[-1] if stored else None
    return render_page(generation(), page_parts(generation(), latest, samples(), stored))


class Tags(HTMLParser):
    """Insists that every element that is opened is closed, in order."""

    VOID = frozenset(("meta", "link", "br", "img", "input", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        for name, value in attrs:
            assert name not in ("src", "href", "srcset", "onload", "onclick"), (tag, name, value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    text = page()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen["svg"] == 8
    assert "script" not in tags.seen
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("svg", re.findall(r"<svg.*?</svg>", page(), re.DOTALL))
def test_a_chart_is_xml_and_stays_within_its_frame(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        places = dict.fromkeys(("x", "x1", "x2", "cx"), width)
        places |= dict.fromkeys(("y", "y1", "y2", "cy"), height)
        for name in places.keys() & element.attrib.keys():
            assert 0 <= float(element.attrib[name]) <= places[name], (element.tag, element.attrib)


def test_predicted_is_held_against_measured() -> None:
    found = {row[0]: row[1:] for row in page_parts(generation(), run(1), (), ())["expected"]}
    assert found["generation"] == ("20-30 tok/s", "27 tok/s", "as predicted")
    assert found["prompt"] == ("900-1,500 tok/s", "1,200 tok/s", "as predicted")
    assert found["first token at 4,000 tokens"] == ("1-2 s", "3.33 s", "worse")
    fast = run(1, speed=50.0)
    assert page_parts(generation(), fast, (), ())["expected"][0][-1] == "better"
    assert page_parts(generation(), None, (), ())["expected"][0][2:] == ("not measured", "")


def test_a_first_token_of_another_length_is_not_compared() -> None:
    short = msgspec.structs.replace(run(1), cells=(cell(1000, 200, 1),))
    rows = page_parts(generation(), short, (), ())["expected"]
    assert rows[-1][2] == "not measured"


def test_a_stack_that_was_not_measured_still_has_its_plan() -> None:
    text = page(runs=0)
    assert "Nothing was measured yet: <code>stackctl bench cpu</code>" in text
    assert "threads" in text
    assert "<svg" not in text


def test_one_run_is_not_compared_with_itself() -> None:
    assert "Generations and objectives" not in page(runs=1)
    assert "Generations and objectives" in page(runs=2)


def test_what_comes_from_elsewhere_is_text() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    named = msgspec.structs.replace(
        generation(), plan=msgspec.structs.replace(generation().plan, served_name=hostile)
    )
    shown = msgspec.structs.replace(run(1, objective=hostile), model=hostile)
    other = msgspec.structs.replace(run(2, generation=2, objective=hostile), model=hostile)
    text = render_page(named, page_parts(named, shown, samples(), [shown, other]))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 27.4, [0, 5, 10, 15, 20, 25, 30]),
        (0.0, 0.0, [0, 0.2]),
        (1000.0, 8000.0, [0, 2000, 4000, 6000, 8000]),
    ],
)
def test_ticks_are_round_and_hold_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert charts.axis_ticks(low, high) == pytest.approx(expected)


def test_a_chart_without_points_is_none() -> None:
    assert charts.line_chart("x", [charts.Series("a", ())], x_label="x", y_label="y") == ""
    assert charts.histogram_chart("x", [1.0] * 7, x_label="s") == ""


@pytest.mark.parametrize("values", [[0.0] * 20, [5.0] * 20, [1e-6 * n for n in range(50)]])
def test_a_histogram_of_anything_holds_everything(values: list[float]) -> None:
    svg = charts.histogram_chart("x", values, x_label="s")
    shares = re.findall(r": ([\d.]+) %<", svg)
    assert sum(map(float, shares)) == pytest.approx(100, abs=2.5)


def test_a_page_is_written_over_a_page_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "stackctl-cpu.html"
    write_page(path, page())
    write_page(path, page(runs=1))
    assert path.read_text() == page(runs=1)
    other = tmp_path / "index.html"
    other.write_text("<!doctype html>mine")
    with pytest.raises(StackctlError, match="not a report") as caught:
        write_page(other, page())
    assert caught.value.exit_code == 5
    assert other.read_text() == "<!doctype html>mine"
    with pytest.raises(StackctlError, match="cannot write"):
        write_page(tmp_path, page())


def test_objectives_are_compared_by_the_newest_run_of_each_generation() -> None:
    rows = page_parts(generation(), run(9), (), [run(8, generation=2), run(9)])["runs"]
    assert [(row[0], row[1]) for row in rows] == [("8", "2"), ("9", "3")]
    assert plan(wish=THROUGHPUT).objective == "throughput"
