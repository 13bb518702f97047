"""What slows a stack down: the owner's set-ups, each rule, and the command on a log."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, EPYC_GPU, IQUEST, plan, shipped, shipped_model
from test_fuzz import damaged
from test_metrics import LLAMA_LOG, read, window

from stackctl.cli.main import run
from stackctl.cli.top import _head, _text
from stackctl.diagnose.load_summary import summarize_load
from stackctl.diagnose.rules import RULES, diagnose
from stackctl.observe.top import TopRow
from stackctl.values.base import from_json, to_json
from stackctl.values.cpu_list import CpuList
from stackctl.values.diagnosis import (
    CpuTime,
    DiagnoseReport,
    Evidence,
    Finding,
    GpuStatus,
)
from stackctl.values.inspection import NodeBytes
from stackctl.values.metrics import EngineMetrics, Histogram, LoggedRequest, LogSamples, LogWindow
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Slo

#: The owner's log of set-up C, as it is.
SETUP_C = """\
(APIServer pid=1) INFO 01-09 19:15:06 [loggers.py:257] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 8.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 12.2%, Prefix cache hit rate: 6.3%
(APIServer pid=1) INFO 01-09 19:15:16 [loggers.py:257] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 8.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 6.3%
(APIServer pid=1) INFO 01-09 19:16:16 [loggers.py:257] Engine 000: Avg prompt throughput: 251.4 tokens/s, Avg generation throughput: 4.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 7.0%, Prefix cache hit rate: 6.4%
(APIServer pid=1) INFO 01-09 19:17:06 [loggers.py:257] Engine 000: Avg prompt throughput: 73.4 tokens/s, Avg generation throughput: 1.1 tokens/s, Running: 0 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: 6.8%
"""  # noqa: E501
#: Its figures of set-up B, with a prompt of the speed that it had.
SETUP_B = "\n".join(
    window(f"01-12 10:00:{10 * n + 6:02}", prompt=p, generation=g, kv=k, hits=22.8)
    for n, (p, g, k) in enumerate(
        ((143.2, 28.3, 2.0), (0.0, 28.0, 2.3), (0.0, 27.8, 2.8), (0.0, 27.4, 3.5))
    )
)
IDLE = "\n".join(
    window(f"01-12 10:00:{10 * n + 6:02}", generation=0.0, running=0, kv=0.0, hits=71.0)
    for n in range(5)
)
GPU_PLAN = plan(EPYC_GPU, shipped_model(shipped("gpu-nvfp4")), shipped("gpu-nvfp4"))
CPU_PLAN = plan(EPYC, IQUEST, shipped("cpu-latency"))


def of_log(log: str, **more: Any) -> tuple[Finding, ...]:
    return diagnose(Evidence(log=read(log), **more))


def named(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def wrong(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.status in ("warn", "fail")]


def replace(value: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(value, **changes)


def histogram(value: float, count: int = 100) -> Histogram:
    """All values the same."""
    return Histogram(buckets=((value, float(count)),), count=float(count), sum=value * count)


# The owner's set-ups


def test_set_up_c() -> None:
    found = of_log(SETUP_C)
    assert wrong(found) == ["decode-bound", "prefix-cache-misses"]
    first, second = found[:2]
    assert first.actual == "generation is the limit: 4.0-8.0 tok/s for 1 request"
    assert first.confidence == "high"
    cleared = named([one for one in found if one.status == "ok"])
    assert cleared["kv-pressure"].actual == "12.5 % at most"
    assert cleared["queueing"].actual == "0 waiting"
    assert cleared["prefill-bound"].actual == "251 tok/s"
    assert second.actual is not None
    assert second.actual.startswith("prefix cache hits 6.3-6.8 %, wanted 60 %")
    # Idle time is no stall, and nobody speaks of hangs.
    notes = [one.actual for one in found if one.status == "info"]
    assert notes == ["windows with 0 running requests are idle time, not stalls"]


def test_the_remedies_are_in_the_owners_order() -> None:
    first = of_log(SETUP_C)[0]
    assert [step.do for step in first.steps] == [
        "aider: diff edits instead of whole files",
        "temperature 0",
        "smaller repo map, fewer added files (/drop)",
        "max-model-len no larger than needed",
        "then a smaller or quantised model (20B-32B)",
    ]
    places = [
        (first.remedy or "").index(word)
        for word in ("diff", "temperature 0", "repo map", "max-model-len", "quantised")
    ]
    assert places == sorted(places)
    assert first.steps[0].command == "stackctl client aider"


def test_set_up_b_has_nothing_wrong_but_the_hit_rate() -> None:
    found = of_log(SETUP_B)
    assert wrong(found) == ["prefix-cache-misses"]
    assert found[0].actual == "prefix cache hits 23 %, wanted 60 %"
    assert named(found)["decode-bound"].actual == "27-28 tok/s a request"
    # Also by what the production profile asks for, and by its plan.
    found = of_log(SETUP_B, plan=GPU_PLAN, stack="x", slo=shipped("gpu-nvfp4").slo)
    assert wrong(found) == ["prefix-cache-misses"]


def test_set_up_b_told_by_figures_alone() -> None:
    lines = (window(generation=g, kv=k, hits=22.8) for g, k in ((28.3, 2.0), (27.4, 3.5)))
    assert wrong(of_log("\n".join(lines))) == ["prefix-cache-misses"]


def test_set_up_a() -> None:
    """40B dense in Q5_K_M on the CPU: prompts of 4,640 tokens take tens of seconds."""
    slow = LoggedRequest(
        at_s=60.0, prompt_tokens=4640, cached_tokens=0, prompt_s=62.0, generated_tokens=200,
        generation_s=17.0, length=4839, finished=True,
    )  # fmt: skip
    log = LogSamples(engine="llama.cpp", known_lines=9, requests=(slow,) * 5)
    evidence = Evidence(
        log=log, plan=CPU_PLAN, stack="cpu", profile="cpu-latency", slo=shipped("cpu-latency").slo
    )
    found = diagnose(evidence)
    first = found[0]
    assert (first.name, first.status) == ("prefill-bound", "fail")
    assert "gpu-gguf" in (first.steps[0].command or "")
    assert "95 % had the first token within 62 s without waiting" in (first.evidence or "")
    assert "decode-bound" not in wrong(found)


def test_an_idle_log_has_nothing_wrong() -> None:
    found = of_log(IDLE)
    assert wrong(found) == []
    assert {one.status for one in found} <= {"ok", "info"}
    assert diagnose(Evidence()) == ()


# Idle, a window's timing, and a hang


def test_a_window_without_tokens_is_no_hang() -> None:
    found = of_log("\n".join((window(generation=0.0), window(generation=28.0, hits=70.0))))
    assert wrong(found) == []
    note = named(found)["empty-windows"].actual or ""
    assert "1 window in a row" in note
    assert "not a hang" in note
    # However many there are: a log cannot tell a hang from a long prompt.
    found = of_log("\n".join([window(generation=0.0, hits=70.0)] * 60))
    assert wrong(found) == []
    assert "60 windows in a row" in (named(found)["empty-windows"].actual or "")


STUCK = EngineMetrics(running=1, waiting=0, prompt_tokens=10.0, generation_tokens=5.0)


def cpu(ran_s: float, waited_s: float = 0.0, interval_s: float = 30.0, **more: Any) -> CpuTime:
    return CpuTime(interval_s=interval_s, ran_s=ran_s, waited_s=waited_s, threads=9, busy=2, **more)


def stuck(**more: Any) -> tuple[Finding, ...]:
    usual: dict[str, Any] = {
        "stack": "x", "before": STUCK, "now": STUCK, "interval_s": 30.0, "cpu": cpu(0.01),
    }  # fmt: skip
    return diagnose(Evidence(**(usual | more)))


def test_a_hang_is_counters_that_stand_still() -> None:
    found = stuck()
    assert (found[0].name, found[0].status) == ("hang", "fail")
    assert found[0].steps[-1].command == "stackctl restart x"


@pytest.mark.parametrize(
    "more",
    [
        {"now": replace(STUCK, generation_tokens=6.0)},
        {"now": replace(STUCK, running=0)},
        {"before": replace(STUCK, running=0), "now": replace(STUCK, running=0)},
        {"cpu": cpu(25.0)},
        {"cpu": None},
        {"interval_s": 5.0, "cpu": cpu(0.0, interval_s=5.0)},
    ],
    ids=["a token", "ended", "idle", "computes", "not counted", "too short"],
)
def test_what_is_no_hang(more: dict[str, Any]) -> None:
    assert "hang" not in named(stuck(**more))


def test_who_neither_answers_nor_computes_hangs() -> None:
    mute: dict[str, Any] = {"before": None, "now": None, "late": True, "interval_s": 15.0}
    assert wrong(stuck(**mute, cpu=cpu(0.01, interval_s=15.0))) == ["hang"]
    busy = stuck(**mute, cpu=cpu(14.0, interval_s=15.0))
    assert "hang" not in named(busy)
    assert "long prompt" in (named(busy)["no-numbers"].actual or "")


# Each limit


def test_slower_than_planned_is_said_though_it_is_fast_enough() -> None:
    lines = "\n".join([window(generation=12.0, hits=70.0)] * 3)
    assert wrong(of_log(lines)) == []
    (first, *_) = of_log(lines, plan=GPU_PLAN, stack="x", profile="gpu-nvfp4")
    assert (first.name, first.status) == ("decode-bound", "warn")
    low, high = GPU_PLAN.prediction.decode_tok_s or (0, 0)
    assert f"planned were {low:.0f}-{high:.0f} tok/s" in (first.evidence or "")


def test_what_the_plan_expects_is_not_a_setting() -> None:
    slow = plan(EPYC, IQUEST, shipped("cpu-latency"))
    slow = replace(slow, prediction=replace(slow.prediction, decode_tok_s=(6.0, 9.0)))
    (first, *_) = of_log(window(generation=8.0, hits=70.0), plan=slow, stack="x")
    assert "not a setting" in (first.evidence or "")


def test_speed_of_many_is_shared() -> None:
    many = "\n".join([window(generation=160.0, running=16, hits=70.0)] * 3)
    assert named(of_log(many))["decode-bound"].actual == "10 tok/s a request"
    few = "\n".join([window(generation=64.0, running=16, hits=70.0)] * 3)
    assert "for 16 requests" in (named(of_log(few))["decode-bound"].actual or "")


def test_one_that_ended_between_two_looks_is_one_request() -> None:
    looks = EngineMetrics(running=1, waiting=0), EngineMetrics(running=0, waiting=0)
    slow = requests(generated_tokens=100, generation_s=30.0)
    found = diagnose(Evidence(log=slow, before=looks[0], now=looks[1], interval_s=5.0))
    assert (named(found)["decode-bound"].actual or "").endswith("3.3 tok/s for 1 request")


def test_throughput_asks_for_no_speed_of_one() -> None:
    lines = "\n".join([window(generation=64.0, running=16, hits=70.0)] * 3)
    batch = replace(GPU_PLAN, objective="throughput")
    assert wrong(of_log(lines, plan=batch)) == []
    assert wrong(of_log(lines, plan=batch, slo=Slo(min_tok_s=5.0))) == ["decode-bound"]


def test_on_a_cpu_a_gpu_comes_first() -> None:
    found = diagnose(Evidence(log=requests(generation_s=60.0), plan=CPU_PLAN, stack="cpu"))
    assert found[0].name == "decode-bound"
    assert found[0].steps[0].command == "stackctl up gpu-gguf"
    assert len(found[0].steps) == 6


def test_prompts_all_the_time_are_not_taken_for_slow_generation() -> None:
    lines = "\n".join([window(prompt=100.0, generation=0.5, hits=70.0)] * 6)
    found = of_log(lines)
    assert wrong(found) == ["prefill-bound"]
    assert found[0].confidence == "medium"


def test_queueing() -> None:
    lines = "\n".join([window(generation=28.0, waiting=3, hits=70.0)] * 4)
    found = of_log(lines, plan=GPU_PLAN, stack="gpu")
    assert wrong(found) == ["queueing"]
    assert found[0].steps[0].command == "stackctl switch throughput --stack gpu"
    busy = replace(GPU_PLAN, objective="throughput")
    found = of_log(lines, plan=busy, stack="gpu", profile="p", asked=Overrides(model="dir:/m x"))
    again = "stackctl up p --model 'dir:/m x' --set concurrency=2"
    assert found[0].steps[0].command == again
    # What waits for memory is not helped by more at once.
    full = "\n".join([window(generation=28.0, waiting=3, kv=98.0, hits=70.0)] * 4)
    remedy = named(of_log(full, plan=GPU_PLAN, stack="gpu", profile="gpu"))["queueing"].remedy
    assert "--set kv_type=fp8" in (remedy or "") and "throughput" not in (remedy or "")
    # Now and then is no finding.
    once = "\n".join([window(generation=28.0, hits=70.0)] * 4 + [window(waiting=1, hits=70.0)])
    assert "queueing" not in wrong(of_log(once))


def test_kv_pressure_and_preemption() -> None:
    lines = "\n".join([window(generation=28.0, kv=97.3, hits=70.0)] * 4)
    assert wrong(of_log(lines)) == ["kv-pressure"]
    before = EngineMetrics(running=2, waiting=0, kv_usage=0.8, preemptions=1.0)
    now = replace(before, preemptions=4.0)
    (first, *_) = diagnose(Evidence(before=before, now=now, interval_s=5.0))
    assert (first.name, first.status) == ("kv-pressure", "fail")


@pytest.mark.parametrize(
    ("name", "sets", "command"),
    [
        ("gpu-nvfp4", (), "engine_args.max-num-batched-tokens=16384"),
        ("gpu-nvfp4", ("engine_args.max-num-batched-tokens=16384",), None),
        ("gpu-gguf", (), None),
        ("gpu-gguf", ("engine_args.ubatch-size=512",), "engine_args.ubatch-size=2048"),
    ],
)
def test_larger_steps_are_of_the_engine_and_larger(
    name: str, sets: tuple[str, ...], command: str | None
) -> None:
    wish = shipped(name, sets=sets)
    slow = requests(prompt_tokens=8000, prompt_s=12.0, cached_tokens=0)
    planned = plan(EPYC_GPU, shipped_model(wish), wish)
    found = named(diagnose(Evidence(stack="g", profile=name, plan=planned, log=slow)))
    last = found["prefill-bound"].steps[2:]
    wanted = [] if command is None else [f"stackctl up {name} --set {command}"]
    assert [step.command for step in last] == wanted


def test_a_small_kv_cache_is_not_asked_for_twice() -> None:
    lines = "\n".join([window(generation=28.0, kv=97.3, hits=70.0)] * 4)
    wish = shipped("gpu-nvfp4", sets=("kv_type=fp8",))
    small = plan(EPYC_GPU, shipped_model(wish), wish)
    for planned, offered in ((GPU_PLAN, True), (small, False)):
        found = named(of_log(lines, plan=planned, stack="g"))["kv-pressure"]
        assert ("kv_type" in (found.remedy or "")) == offered


def test_histograms_come_before_what_the_log_averages() -> None:
    """Queue and prompts by vLLM's own numbers; its log has averages with idle time in them."""
    now = EngineMetrics(
        running=0, waiting=0, prompt_tokens=100_000.0, generation_tokens=20_000.0, prompt_s=60.0,
        generation_s=700.0, ttft=histogram(0.5), itl=histogram(0.035, 20_000),
        queue=histogram(4.0), e2e=histogram(10.0), prompt_lengths=histogram(1000.0),
        output_lengths=histogram(200.0), prefix_queries=300_000.0, prefix_hits=200_000.0,
    )  # fmt: skip
    load = summarize_load(Evidence(log=read(SETUP_C), now=now))
    assert load.prompt is not None
    assert round(load.prompt.typical) == 1667
    assert load.prompt_share == pytest.approx(60 / 760)
    found = diagnose(Evidence(now=now))
    assert wrong(found) == ["queueing"]
    assert "waiting was 40 % of the time" in (found[0].evidence or "")
    assert named(found)["decode-bound"].actual == "29 tok/s a request"


def requests(count: int = 30, **changes: Any) -> LogSamples:
    usual: dict[str, Any] = {
        "at_s": 1.0, "prompt_tokens": 100, "cached_tokens": 900, "prompt_s": 0.5,
        "generated_tokens": 100, "generation_s": 4.0, "length": 1100, "finished": True,
    }  # fmt: skip
    return LogSamples(
        engine="llama.cpp", known_lines=1, requests=(LoggedRequest(**(usual | changes)),) * count
    )


def test_requests_that_are_well() -> None:
    found = diagnose(Evidence(log=requests()))
    assert wrong(found) == []
    assert named(found)["prefix-cache-misses"].actual == "90 %"


def test_long_answers() -> None:
    found = diagnose(Evidence(log=requests(generated_tokens=1600, generation_s=60.0)))
    assert wrong(found) == ["whole-file-edits"]
    assert found[0].actual == "answers are long: 1,600 tokens on average, 60 s each"
    # Who gives up before the first token makes answers no shorter.
    given_up = requests(generated_tokens=None, generation_s=None, cached_tokens=None)
    long = requests(generated_tokens=1600, generation_s=60.0)
    both = replace(long, requests=long.requests + given_up.requests)
    assert named(diagnose(Evidence(log=both)))["whole-file-edits"].actual == found[0].actual
    # Two answers are no habit.
    two = diagnose(Evidence(log=requests(2, generated_tokens=1600, generation_s=60.0)))
    assert wrong(two) == []


def test_a_first_token_that_the_profile_wants_sooner() -> None:
    now = EngineMetrics(
        running=0, prompt_tokens=1e5, generation_tokens=2e4, prompt_s=60.0, generation_s=700.0,
        ttft=histogram(8.0), itl=histogram(0.035), queue=histogram(0.1), e2e=histogram(10.0),
    )  # fmt: skip
    assert wrong(diagnose(Evidence(now=now))) == []
    (first, *_) = diagnose(Evidence(now=now, slo=Slo(ttft_s=5.0)))
    assert (first.name, first.status) == ("prefill-bound", "fail")
    assert (first.actual or "").startswith("the first token comes late")
    waits = replace(now, queue=histogram(7.0))
    assert wrong(diagnose(Evidence(now=waits, slo=Slo(ttft_s=5.0)))) == ["queueing"]
    # Nothing is promised for prompts that are longer than the profile says.
    longer = replace(now, prompt_lengths=histogram(20000.0))
    assert wrong(diagnose(Evidence(now=longer, slo=Slo(ttft_s=5.0)))) == []
    asked = Slo(ttft_s=5.0, prompt_tokens=32768)
    assert wrong(diagnose(Evidence(now=longer, slo=asked))) == ["prefill-bound"]


def test_the_hit_rate_that_the_profile_wants() -> None:
    well = of_log(SETUP_B, slo=Slo(min_prefix_hits=0.2))
    assert wrong(well) == []
    (missed,) = (
        one for one in of_log(SETUP_B, slo=Slo(min_prefix_hits=0.3)) if one.status == "warn"
    )
    assert missed.expected == "at least 30 %"


def test_rare_preemptions_of_long_ago_are_no_finding() -> None:
    now = EngineMetrics(running=0, kv_usage=0.1, preemptions=3.0, finished=5000.0)
    assert named(diagnose(Evidence(now=now)))["kv-pressure"].status == "ok"
    often = replace(now, finished=50.0)
    assert wrong(diagnose(Evidence(now=often))) == ["kv-pressure"]


def test_what_was_asked_for_is_asked_for_again() -> None:
    asked = Overrides(sets=("context=8192", "port=81"), model="file:/m.gguf", name="mine")
    evidence = Evidence(log=requests(generation_s=60.0), stack="mine", profile="p", asked=asked)
    evidence = replace(evidence, plan=CPU_PLAN)
    commands = [step.command for step in diagnose(evidence)[0].steps]
    assert (
        "stackctl up p --model file:/m.gguf --name mine --set port=81 --set context=2048"
        in commands
    )
    assert "stackctl up p --model SOURCE --name mine --set context=8192 --set port=81" in commands


def test_a_context_that_nobody_needs() -> None:
    log = replace(requests(), context=32768)
    (first, *_) = diagnose(Evidence(log=log))
    assert first.name == "context-oversized"
    assert first.steps[0].command == "--ctx-size 2048"
    few = replace(requests(19), context=32768)
    assert "context-oversized" not in named(diagnose(Evidence(log=few)))
    assert wrong(diagnose(Evidence(log=replace(requests(), context=4096)))) == []


def test_short_prompts_need_no_cache() -> None:
    found = diagnose(Evidence(log=requests(prompt_tokens=40, cached_tokens=0)))
    assert wrong(found) == []
    found = diagnose(Evidence(log=requests(prompt_tokens=900, cached_tokens=100)))
    assert wrong(found) == ["prefix-cache-misses"]


# Causes


def test_threads_that_wait_for_a_core() -> None:
    evidence = Evidence(
        log=requests(generation_s=60.0), cpu=cpu(10.0, 30.0, allowed=2), stack="x", profile="p"
    )
    found = diagnose(evidence)
    # The cause, and then what it causes.
    assert wrong(found) == ["oversubscribed-threads", "decode-bound"]
    assert "75 % of the time" in (found[0].actual or "")
    assert found[0].effect == "up to 4.0 times as fast"
    # It ran for 10 of the 60 seconds that two CPUs have in 30.
    free = diagnose(replace(evidence, cpu=cpu(10.0, 300.0, allowed=2)))
    assert free[0].effect == "up to 6.0 times as fast"
    own = diagnose(replace(evidence, cpu=cpu(59.0, 100.0, allowed=2)))
    crowd = named(own)["oversubscribed-threads"]
    assert (crowd.status, crowd.confidence) == ("warn", "medium")
    assert crowd.steps[0].command == "stackctl up p --set engine_args.threads=2"
    ok = diagnose(Evidence(cpu=cpu(30.0, 1.0)))
    assert [(one.name, one.status) for one in ok] == [("oversubscribed-threads", "ok")]
    assert diagnose(Evidence(cpu=cpu(0.1, 0.2))) == ()


def test_more_threads_than_cores() -> None:
    planned = replace(CPU_PLAN, argv=("llama-server", "--threads", "32"))
    (first, *_) = diagnose(Evidence(plan=planned, cpu=cpu(20.0, 20.0, allowed=16), profile="cpu"))
    assert (first.name, first.actual) == ("oversubscribed-threads", "32 threads on 16 CPUs")
    assert first.steps[0].command == "stackctl up cpu --set engine_args.threads=16"


def placed(**changes: Any) -> Plan:
    placement = msgspec.structs.replace(CPU_PLAN.placement, **changes)
    return msgspec.structs.replace(CPU_PLAN, placement=placement)


def test_pages_on_other_nodes() -> None:
    bound = placed(mems=CpuList([1]), policy="bind")
    pages = (NodeBytes(node=0, bytes=3 * 2**30), NodeBytes(node=1, bytes=2**30))
    (first, *_) = diagnose(Evidence(plan=bound, pages=pages, stack="x", profile="cpu"))
    assert (first.name, first.status) == ("page-cache-misplacement", "fail")
    assert first.actual == "75 % of its memory lies on other nodes"
    # The kernel keeps pages that are mapped: nothing runs when they are dropped.
    assert [step.command for step in first.steps] == [
        "stackctl down x",
        "echo 1 | sudo tee /proc/sys/vm/drop_caches",
        "stackctl up cpu",
    ]
    well = (NodeBytes(node=0, bytes=2**20), NodeBytes(node=1, bytes=2**30))
    assert wrong(diagnose(Evidence(plan=bound, pages=well))) == []
    spread = placed(mems=CpuList([0, 1]), policy="interleave")
    assert wrong(diagnose(Evidence(plan=spread, pages=pages))) == []
    assert wrong(diagnose(Evidence(plan=spread, pages=well))) == ["page-cache-misplacement"]
    # Of workers that feed a GPU it lies where there is room.
    assert diagnose(Evidence(plan=placed(mems=CpuList([1]), policy="preferred"), pages=pages)) == ()


def test_a_gpu_that_is_not_used() -> None:
    line = "warning: no usable GPU found, --gpu-layers option will be ignored"
    found = diagnose(Evidence(log=read(f"{line}\n{LLAMA_LOG}")))
    assert wrong(found)[0] == "cpu-fallback"
    gpu = GpuStatus(index=0, pids=(7,), used_bytes=2**30)
    assert wrong(diagnose(Evidence(plan=GPU_PLAN, gpus=(gpu,), pids=(1, 2)))) == ["cpu-fallback"]
    assert wrong(diagnose(Evidence(plan=GPU_PLAN, gpus=(gpu,), pids=(1, 7)))) == []
    for unknown in (replace(gpu, pids=None), replace(gpu, pids=(), used_bytes=60 * 2**30)):
        assert wrong(diagnose(Evidence(plan=GPU_PLAN, gpus=(unknown,), pids=(1,)))) == []
    empty = replace(gpu, pids=(), used_bytes=2**20)
    assert wrong(diagnose(Evidence(plan=GPU_PLAN, gpus=(empty,), pids=(1,)))) == ["cpu-fallback"]
    on_cpu = window(generation=28.0, hits=70.0).replace("GPU KV", "CPU KV")
    assert wrong(of_log(on_cpu, plan=GPU_PLAN)) == ["cpu-fallback"]


def test_heat_and_power() -> None:
    gpu = GpuStatus(index=0, clock_mhz=1200, clock_most_mhz=2400, temperature_c=92)

    def seen(**changes: Any) -> tuple[Finding, ...]:
        return diagnose(Evidence(plan=GPU_PLAN, gpus=(replace(gpu, **changes),)))

    assert named(seen())["thermal-limit"].status == "ok"
    (hot,) = seen(throttled=("heat-hardware",))
    assert (hot.name, hot.status, hot.evidence) == (
        "thermal-limit", "warn", "1200 of 2400 MHz, 92 °C",
    )  # fmt: skip
    assert seen(throttled=("power-limit",))[0].name == "power-limit"
    # A card at its power limit that is hardly slower does what it is bought for.
    assert wrong(seen(throttled=("power-limit",), clock_mhz=2300)) == []


def test_the_loop_model_is_named() -> None:
    log = (
        "(APIServer pid=1) INFO 01-09 19:00:00 [model.py:733] Resolved architecture: "
        f"IQuestLoopCoderForCausalLM\n{SETUP_C}"
    )
    found = of_log(log)
    assert found[0].name == "decode-bound"
    assert "loop-model" in wrong(found)
    assert "Instruct" in found[0].steps[-1].do
    twice = replace(GPU_PLAN, model=replace(GPU_PLAN.model, passes=2))
    assert wrong(diagnose(Evidence(plan=twice))) == ["loop-model"]


def test_findings_of_any_numbers_can_be_told() -> None:
    rng = random.Random(7)
    numbers = (0.0, 1e-9, 0.5, 1.0, 3.0, 1e6, 1e15)
    known = {name for rules in RULES for rule in rules for name in rule.names}

    def any_of(*more: Any) -> Any:
        return rng.choice((None, *numbers, *more))

    for _ in range(500):
        windows = tuple(
            LogWindow(
                seconds=10.0, prompt_tok_s=rng.choice(numbers),
                generation_tok_s=rng.choice(numbers),
                running=rng.randrange(3), waiting=rng.randrange(3), kv_usage=any_of(),
                hit_rate=any_of(),
            )
            for _ in range(rng.randrange(4))
        )  # fmt: skip
        one = LoggedRequest(
            prompt_tokens=rng.randrange(99), prompt_s=any_of(), generated_tokens=rng.randrange(99),
            generation_s=any_of(), cached_tokens=rng.choice((None, 0, 9)),
            length=rng.choice((None, 0, 99)), finished=rng.random() < 0.5,
        )  # fmt: skip
        looks = [
            EngineMetrics(
                running=rng.choice((None, 0, 1)), kv_usage=any_of(), prompt_tokens=any_of(),
                generation_tokens=any_of(), prompt_s=any_of(), generation_s=any_of(),
                prefix_queries=any_of(), prefix_hits=any_of(), itl=rng.choice((None, Histogram())),
                ttft=histogram(rng.choice(numbers), rng.randrange(3)), preemptions=any_of(),
            )
            for _ in range(2)
        ]  # fmt: skip
        log = LogSamples(engine="vllm", windows=windows, requests=(one,) * rng.randrange(30))
        evidence = Evidence(
            log=log, before=looks[0], now=looks[1], interval_s=5.0, late=rng.random() < 0.2,
            cpu=cpu(rng.choice(numbers), rng.choice(numbers)), stack="x",
            slo=rng.choice((None, Slo(min_tok_s=3.0))),
        )  # fmt: skip
        report = DiagnoseReport(results=diagnose(evidence))
        assert {one.name for one in report.results} <= known
        assert all(one.steps for one in report.results if one.status in ("fail", "warn"))
        assert from_json(to_json(report), DiagnoseReport, where="again") == report


# The command


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = run(("diagnose", *words))
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    for name in ("STATE", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.log").write_text(SETUP_C)
    (tmp_path / "b.log").write_text(SETUP_B)
    (tmp_path / "idle.log").write_text(IDLE)
    yield Command(capsys)


def test_the_transcript(command: Command) -> None:
    code, out, err = command("--log", "c.log")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "1  generation is the limit: 4.0-8.0 tok/s for 1 request"
    cleared = out[out.index("cleared: ") : out.index("do, in this order")]
    for words in ("KV cache and memory (12.5 %", "queue (0 waiting)", "prompts (251 tok/s)"):
        assert words in " ".join(cleared.split())
    assert re.search(r"^2  prefix cache hits 6\.3-6\.8 %, wanted 60 %", out, re.MULTILINE)
    assert lines[-1] == "note  windows with 0 running requests are idle time, not stalls"


def test_nothing_wrong_is_said_so(command: Command) -> None:
    code, out, _ = command("--log", "idle.log")
    assert (code, out.splitlines()[0]) == (0, "nothing is wrong")


def test_a_log_without_requests_says_so(command: Command, tmp_path: Path) -> None:
    line = "0.01.133.667 I srv  llama_server: listening on http://127.0.0.1:8081\n"
    (tmp_path / "quiet.log").write_text(line)
    code, out, _ = command("--log", "quiet.log")
    assert (code, out) == (0, "nothing to tell: no request was seen\n")


def test_json(command: Command) -> None:
    code, out, _ = command("--log", "c.log", "--json")
    assert code == 0
    report = from_json(out, DiagnoseReport, where="stdout")
    assert (report.source, report.engine, report.windows) == ("c.log", "vllm", 4)
    assert report.results[0].name == "decode-bound"
    raw = msgspec.json.decode(out)
    assert next(iter(raw)) == "schema"
    assert list(raw["results"][0])[:6] == [
        "name", "status", "expected", "actual", "evidence", "remedy",
    ]  # fmt: skip


def test_since_is_by_the_logs_own_clock(command: Command, tmp_path: Path) -> None:
    (tmp_path / "both.log").write_text(f"{SETUP_C * 3}{SETUP_B}\n")
    _, out, _ = command("--log", "both.log")
    assert "generation is the limit" in out
    _, out, _ = command("--log", "both.log", "--since", "10m")
    assert out.startswith("1  prefix cache hits 23 %")


def test_stdin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stackctl", "diagnose", "--log", "-"],
        input=SETUP_C.encode() + b"\xff\x1b[31m\n", capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(b"1  generation is the limit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--log", "none.log"), "cannot read none.log: No such file"),
        (("--log", "."), "cannot read .: Is a directory"),
        (("--log", "text"), "no engine's log: text"),
        (("--log", "empty"), "no engine's log: empty"),
        (("--log", "binary"), "no engine's log: binary"),
        (("--log", "c.log", "--since", "soon"), "'soon' is not a duration"),
        (("--log", "c.log", "--since", "0"), "--since must be above 0"),
        (("cpu", "--log", "c.log"), "a stack or --log, not both"),
    ],
)
def test_bad_input_is_one_error(
    command: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "text").write_text("nothing of an engine\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(os.urandom(2**17).replace(b"time", b"") + b"\0" * 2**17)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_damaged_log_is_read_or_refused(command: Command, tmp_path: Path) -> None:
    rng = random.Random(99)
    for _ in range(150):
        raw = damaged((SETUP_C + LLAMA_LOG).encode(), rng)
        (tmp_path / "damaged.log").write_bytes(raw)
        code, _, err = command("--log", "damaged.log")
        assert code in (0, 2)
        assert "bug" not in err


# Rows of top


def test_rows_of_top_fit_80_columns() -> None:
    full = TopRow(
        stack="a-stack-with-a-name-that-is-far-too-long", in_tok_s=123456.7, out_tok_s=99999.9,
        running=128, waiting=9999, kv=1.0, hits=1.0, ttft_s=2560.0, itl_s=0.9994, cpu=128.0,
        gpu=1.0, estimated=("kv_usage", "ttft_s", "itl_s"),
    )  # fmt: skip
    assert max(len(line) for line in (*_head(), _text(full))) <= 79
    empty = _text(TopRow(stack="x"))
    assert empty.split() == ["x"] + ["-"] * 10
    mute = _text(TopRow(stack="x", note="does not answer", cpu=1.5))
    assert mute.endswith(" does not answer, 1.5 cores")
