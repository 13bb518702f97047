"""What engines tell of their speed: Prometheus' format, logs, histograms; and what we tell."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as oracle
from test_fuzz import damaged

from stackctl.diagnose.load_summary import last_seconds, read_log
from stackctl.engines import ENGINES, engine
from stackctl.engines.prometheus_text import Scrape, parse_samples
from stackctl.observe.engine_snapshot import cpu_time
from stackctl.observe.metrics import histograms, metrics_text
from stackctl.observe.procfs import ThreadTimes
from stackctl.values.base import from_json, to_json
from stackctl.values.metrics import (
    EngineMetrics,
    Histogram,
    LoggedRequest,
    LogSamples,
    MetricsReport,
    StackMetrics,
)

#: As vLLM 0.32 prints it, shortened, with two engines of one server.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 1000.0
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 250.0
vllm:num_preemptions_total{engine="0",model_name="tiny"} 0.0
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 1000.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 750.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_cache_hit"} 250.0
vllm:prompt_tokens_cached_total{engine="0",model_name="tiny"} 250.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 40.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 1.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="tiny"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="1.0",model_name="tiny"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 4.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"} 4.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="tiny"} 3.5
vllm:cache_config_info{block_size="128",kv_cache_size_tokens="2097152",num_cpu_blocks="None"} 1.0
"""
#: As llama-server b11669 prints it.
LLAMA = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 71
llamacpp:prompt_tokens_cached_total 67
llamacpp:prompt_seconds_total 0.5
llamacpp:tokens_predicted_total 33
llamacpp:tokens_predicted_seconds_total 1.5
llamacpp:n_decode_total 45
llamacpp:n_tokens_max 42
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
"""
SLOTS = """[{"id": 0, "n_ctx": 8192, "is_processing": true, "n_prompt_tokens": 36,
"next_token": [{"n_remain": 294, "n_decoded": 6}]}, {"id": 1, "n_ctx": 8192,
"is_processing": false, "n_prompt_tokens": 500, "next_token": [{"n_decoded": 9}]}]"""
#: Of one request that ended, one that was cut off in its prompt, and one that still answers.
LLAMA_LOG = """\
0.03.428.093 I cmn          init: llama threadpool init, n_threads = 2
0.07.021.470 I srv    load_model: initializing, n_slots = 1, n_ctx_slot = 8192, kv_unified = 'false'
0.23.920.998 I slot launch_slot_: id  0 | task 19 | processing task, is_child = 0
0.31.087.986 I slot print_timing: id  0 | task 19 | prompt eval time =    1149.44 ms /     5 tokens (  229.89 ms per token,     4.35 tokens per second)
0.31.087.995 I slot print_timing: id  0 | task 19 |        eval time =    6017.50 ms /     8 tokens (  859.64 ms per token,     1.16 tokens per second)
0.31.087.996 I slot print_timing: id  0 | task 19 |       total time =    7166.94 ms /    13 tokens
0.31.088.743 I slot      release: id  0 | task 19 | stop processing: n_tokens = 34, truncated = 0
0.41.135.204 I slot launch_slot_: id  0 | task 42 | processing task, is_child = 0
2.22.351.285 I slot      release: id  0 | task 42 | stop processing: n_tokens = 176, truncated = 0
2.22.353.717 I slot launch_slot_: id  0 | task 210 | processing task, is_child = 0
2.31.051.042 I slot print_timing: id  0 | task 210 | prompt processing, n_tokens =    512, progress = 0.59, t =   8.70 s / 58.87 tokens per second
2.45.411.861 I slot print_timing: id  0 | task 210 | n_gen =    105, tg =   1.50 t/s, tg_3s =   1.35 t/s
"""  # noqa: E501
#: As builds before 2026 print the timings: without the task before each line.
OLD_LLAMA_LOG = """\
slot launch_slot_: id  3 | task 7 | processing task
slot print_timing: id  3 | task 7 | 
prompt eval time =    2000.00 ms /   100 tokens (   20.00 ms per token,    50.00 tokens per second)
       eval time =    1000.00 ms /    11 tokens (   90.91 ms per token,    11.00 tokens per second)
      total time =    3000.00 ms /   111 tokens
slot      release: id  3 | task 7 | stop processing: n_past = 110, truncated = 0
"""  # noqa: W291


def window(at: str = "01-09 19:15:06", **changes: object) -> str:
    """A line of vLLM's log."""
    seen = {"prompt": 0.0, "generation": 8.0, "running": 1, "waiting": 0, "kv": 12.2, "hits": 6.3}
    seen |= changes  # type: ignore[arg-type]
    return (
        f"(APIServer pid=1) INFO {at} [loggers.py:257] Engine 000: Avg prompt throughput: "
        f"{seen['prompt']} tokens/s, Avg generation throughput: {seen['generation']} tokens/s, "
        f"Running: {seen['running']} reqs, Waiting: {seen['waiting']} reqs, "
        f"GPU KV cache usage: {seen['kv']}%, Prefix cache hit rate: {seen['hits']}%"
    )


def read(log: str) -> LogSamples:
    found = read_log(log.splitlines())
    assert found is not None
    return found


# Prometheus' format


def test_the_parser_agrees_with_prometheus_own() -> None:
    for given_text in (VLLM, LLAMA, _own_metrics()):
        ours = sorted(
            (s.name, sorted(s.labels.items()), s.value) for s in parse_samples(given_text)
        )
        theirs = sorted(
            (s.name, sorted(s.labels.items()), s.value)
            for family in oracle(given_text)
            for s in family.samples
        )
        assert ours == theirs


@given(
    st.dictionaries(
        st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,9}", fullmatch=True), st.text(max_size=12)
    ),
    st.floats(allow_nan=False),
)
def test_labels_of_any_text_come_back(labels: Mapping[str, str], value: float) -> None:
    plain = {name: v.replace("\n", " ").replace("\r", " ") for name, v in labels.items()}
    inside = ",".join(
        '{}="{}"'.format(name, v.replace("\\", r"\\").replace('"', r"\""))
        for name, v in plain.items()
    )
    number = {float("inf"): "+Inf", float("-inf"): "-Inf"}.get(value, repr(value))
    (seen,) = parse_samples(f"m{{{inside}}} {number}\n")
    assert (seen.name, seen.labels, seen.value) == ("m", plain, value)


@pytest.mark.parametrize(
    "line",
    ["", "# TYPE x gauge", "x", "x y", "x 1 2 3", "1x 1", 'x{a="b} 1', "x{a=b} 1", "x1", "x 1_0"],
)
def test_what_is_no_sample_is_passed_over(line: str) -> None:
    assert [s.name for s in parse_samples(f"{line}\nm 1")] == ["m"]


def test_a_text_that_invites_backtracking_is_read_at_once() -> None:
    evil = "x{" + 'a="' * 3000 + "\n" + "x{" + 'a="b",' * 3000 + "\n" + "x" + " " * 9000 + "y\n"
    assert list(parse_samples(evil)) == []


@given(st.text())
def test_any_text_is_read(anything: str) -> None:
    for kind in ENGINES.values():
        kind.parse_metrics({"/metrics": anything, "/slots": anything}, ("--ctx-size", "4096"))
    read_log(anything.splitlines())


def test_damaged_texts_and_logs_are_read() -> None:
    rng = random.Random(20261128)
    logs = "\n".join((window(), window(prompt=251.4), LLAMA_LOG, OLD_LLAMA_LOG))
    for _ in range(400):
        for kind in ENGINES.values():
            answers = {
                "/metrics": damaged((VLLM + LLAMA).encode(), rng).decode("utf-8", "replace"),
                "/slots": damaged(SLOTS.encode(), rng).decode("utf-8", "replace"),
            }
            seen = kind.parse_metrics(answers, ("--ctx-size", "8192"))
            to_json(seen)
        found = read_log(damaged(logs.encode(), rng).decode("utf-8", "replace").splitlines())
        if found is not None:
            assert from_json(to_json(found), LogSamples, where="again") == found


# Engines' numbers


def test_vllm_tells_it_all() -> None:
    seen = engine("vllm").parse_metrics({"/metrics": VLLM}, ())
    assert (seen.running, seen.waiting, seen.kv_usage) == (3, 4, 0.5)
    # Computed ones: cached tokens apart.
    assert (seen.prompt_tokens, seen.cached_tokens, seen.generation_tokens) == (750, 250, 40)
    assert (seen.prefix_queries, seen.prefix_hits, seen.preemptions) == (1000, 250, 0)
    assert (seen.finished, seen.kv_capacity_tokens) == (4, 2097152)
    assert seen.ttft == Histogram(buckets=((0.5, 1.0), (1.0, 3.0)), count=4.0, sum=3.5)
    assert seen.itl is None
    assert seen.estimates == ()


def test_llama_cpp_counts_what_slots_are_at() -> None:
    argv = ("llama-server", "--ctx-size", "8192", "--parallel", "2")
    seen = engine("llama.cpp").parse_metrics({"/metrics": LLAMA, "/slots": SLOTS}, argv)
    assert (seen.running, seen.waiting) == (1, 2)
    assert seen.generation_tokens == 33 + 6
    assert seen.kv_usage == 36 / 8192
    assert seen.estimates == ("kv_usage",)
    assert (seen.prefix_queries, seen.prefix_hits) == (71 + 67, 67)
    assert (seen.prompt_s, seen.generation_s, seen.steps, seen.longest_tokens) == (0.5, 1.5, 45, 42)


def test_what_is_not_told_is_unknown() -> None:
    for kind in ENGINES.values():
        assert kind.parse_metrics({}, ()) == EngineMetrics()
    without = engine("llama.cpp").parse_metrics({"/metrics": LLAMA}, ("--ctx-size", "8192"))
    assert without.kv_usage is None
    assert without.estimates == ()
    assert without.generation_tokens == 33


def test_a_number_that_is_none_is_unknown() -> None:
    assert Scrape("m NaN\nm +Inf").total("m") is None


# Logs


def test_a_window_of_vllm() -> None:
    log = read(window(prompt=251.4, generation=4.0, kv=7.0, hits=6.4, waiting=2))
    assert (log.engine, log.place, log.known_lines) == ("vllm", "GPU", 1)
    (seen,) = log.windows
    assert (seen.prompt_tok_s, seen.generation_tok_s) == (251.4, 4.0)
    assert (seen.running, seen.waiting) == (1, 2)
    assert seen.kv_usage == pytest.approx(0.07)
    assert seen.hit_rate == pytest.approx(0.064)


def test_windows_have_the_logs_own_clock() -> None:
    log = read("\n".join(window(at) for at in ("12-31 23:59:56", "01-01 00:00:06", "junk")))
    first, second, third = (one.at_s for one in log.windows)
    assert first is not None
    assert second is not None
    assert second - first == 10
    assert third is None
    assert len(last_seconds(log, 5).windows) == 2  # what has no time is not known to be old


def test_optional_fields_and_other_hands_do_not_matter() -> None:
    line = window().replace(
        "GPU KV", "MM cache hit rate: 1.0%, External prefix cache hit rate: 99.0%, CPU KV"
    )
    log = read(f"Jan 09 19:15:07 host vllm[7]: {line}\r")
    assert log.place == "CPU"
    assert log.windows[0].hit_rate == pytest.approx(0.063)
    short = read(window().partition(", GPU KV")[0])
    assert (short.windows[0].kv_usage, short.windows[0].hit_rate) == (None, None)


def test_requests_of_llama_cpp() -> None:
    log = read(LLAMA_LOG)
    assert (log.engine, log.threads, log.slots, log.context) == ("llama.cpp", 2, 1, 8192)
    done, going = log.requests
    assert done.finished
    assert (done.prompt_tokens, done.prompt_s) == (5, 1.14944)
    assert (done.generated_tokens, done.generation_s) == (8, 6.0175)
    # 34 in the end, of which 5 and 8 were computed, the last one not kept.
    assert (done.length, done.cached_tokens) == (34, 22)
    assert done.generation_tok_s == pytest.approx(1.16, abs=0.01)
    assert not going.finished
    assert (going.prompt_tokens, going.prompt_s) == (512, 8.70)
    assert (going.generated_tokens, going.generation_s) == (105, 70)
    assert (going.at_s or 0) - (done.at_s or 0) == pytest.approx(134.323, abs=0.01)


def test_requests_of_older_builds() -> None:
    (seen,) = read(OLD_LLAMA_LOG).requests
    assert seen.finished
    assert (seen.prompt_tokens, seen.generated_tokens, seen.cached_tokens) == (100, 11, 0)
    assert (seen.prompt_tok_s, seen.generation_tok_s) == (50, 10)


def test_the_clock_goes_on_after_a_restart() -> None:
    log = read(LLAMA_LOG + LLAMA_LOG)
    times = [one.at_s or 0 for one in log.requests]
    assert times == sorted(times)
    assert len(last_seconds(log, 20).requests) == 1


def test_a_text_of_no_engine_is_none() -> None:
    assert read_log(["hello", "INFO all is well", ""]) is None


def test_a_quiet_log_is_an_engines_all_the_same() -> None:
    log = read("0.01.133.667 I srv  llama_server: listening on http://127.0.0.1:8081")
    assert (log.engine, log.requests) == ("llama.cpp", ())


# Histograms

_COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


@given(_COUNTS, st.integers(0, 50), st.floats(0, 1))
def test_a_quantile_lies_within_the_bounds_and_rises(
    counts: list[int], above: int, share: float
) -> None:
    total, buckets = 0, []
    for number, count in enumerate(counts, 1):
        total += count
        buckets.append((float(number), float(total)))
    one = Histogram(buckets=tuple(buckets), count=float(total + above), sum=1.0)
    low, high = one.quantile(share / 2), one.quantile(share)
    if total + above == 0:
        assert low is high is None
    else:
        assert low is not None
        assert high is not None
        assert 0 <= low <= high <= len(counts)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=50), st.floats(0.05, 1))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = (0.01, 0.1, 1.0, 10.0, 100.0)
    one = Histogram(
        buckets=tuple((b, float(sum(v <= b for v in values))) for b in bounds),
        count=float(len(values)),
        sum=sum(values),
    )
    rank = max(1, -(-len(values) * share // 1))
    true = sorted(values)[int(rank) - 1]
    seen = one.quantile(share)
    assert seen is not None
    upper = next(b for b in bounds if true <= b)
    lower = max((b for b in bounds if b < upper), default=0.0)
    assert lower <= seen <= upper


def test_what_came_between_two_looks() -> None:
    before = Histogram(buckets=((1.0, 2.0), (2.0, 3.0)), count=3.0, sum=4.0)
    after = Histogram(buckets=((1.0, 5.0), (2.0, 7.0)), count=8.0, sum=10.0)
    since = after.since(before)
    assert (since.buckets, since.count, since.mean) == (((1.0, 3.0), (2.0, 4.0)), 5.0, 1.2)
    # Fewer than before: the engine was started again.
    assert before.since(after) == before


def test_latencies_of_requests() -> None:
    ttft, token_time = histograms(
        (
            LoggedRequest(prompt_tokens=9, prompt_s=0.3, generated_tokens=11, generation_s=1.0,
                    finished=True),
            LoggedRequest(prompt_tokens=9, prompt_s=7.0, generated_tokens=1, generation_s=0.0,
                    finished=True),
            LoggedRequest(prompt_tokens=9, prompt_s=99.0),
            LoggedRequest(prompt_tokens=9, prompt_s=2.0, finished=True),
        )
    )  # fmt: skip
    assert (ttft.count, ttft.sum) == (2, 7.3)
    assert dict(ttft.buckets)[0.25] == 0
    assert dict(ttft.buckets)[0.5] == 1
    assert dict(ttft.buckets)[7.5] == 2
    assert token_time.count == 1
    assert token_time.sum == pytest.approx(0.1)


# What we tell


def _own_metrics() -> str:
    ttft, token_time = histograms(read(LLAMA_LOG).requests)
    cpu = StackMetrics(
        stack="cpu", profile="cpu", engine="llama.cpp", model='a "quoted\\name"', generation=3,
        state="ready", restarts=2, since_s=12.5, checked="ok", checked_at=1.7e9,
        numbers=EngineMetrics(kv_usage=0.25, estimates=("kv_usage",)), ttft=ttft,
        token_time=token_time,
    )  # fmt: skip
    gone = StackMetrics(stack="gone", state="unknown")
    return metrics_text(MetricsReport(scope="user", guard=True, stacks=(cpu, gone)))


def test_our_metrics_are_in_prometheus_format() -> None:
    families = {family.name: family for family in oracle(_own_metrics())}
    kinds = {name: family.type for name, family in families.items()}
    assert kinds["stackctl_restarts"] == "counter"
    assert kinds["stackctl_time_to_first_token_seconds"] == "histogram"
    for name in ("kv_cache_usage_ratio", "time_to_first_token_seconds"):
        assert families[f"stackctl_{name}"].documentation.startswith("Estimate: ")
    values = {
        (s.name, s.labels["stack"]): s.value
        for s in families["stackctl_up"].samples + families["stackctl_kv_cache_usage_ratio"].samples
    }
    assert values == {
        ("stackctl_up", "cpu"): 1, ("stackctl_up", "gone"): 0,
        ("stackctl_kv_cache_usage_ratio", "cpu"): 0.25,
    }  # fmt: skip
    states = [s for s in families["stackctl_stack_state"].samples if s.value]
    assert [(s.labels["stack"], s.labels["state"]) for s in states] == [
        ("cpu", "ready"), ("gone", "unknown"),
    ]  # fmt: skip


def test_no_stacks_no_metrics() -> None:
    assert metrics_text(MetricsReport(scope="user", stacks=())) == ""


def test_metrics_as_json_come_back() -> None:
    report = MetricsReport(scope="user", stacks=(StackMetrics(stack="x", state="ready"),))
    assert from_json(to_json(report), MetricsReport, where="again") == report
    assert msgspec.json.decode(to_json(report))["schema"] == "stackctl.metrics/1"


# What the kernel says


def test_time_of_threads() -> None:
    before = {(1, 1): ThreadTimes(10**9, 0), (1, 2): ThreadTimes(0, 0), (1, 3): ThreadTimes(5, 5)}
    after = {
        (1, 1): ThreadTimes(3 * 10**9, 2 * 10**9),
        (1, 2): ThreadTimes(10**8, 0),
        (2, 2): ThreadTimes(10**9, 10**9),
    }
    seen = cpu_time(before, after, 4.0, 2)
    assert seen.ran_s == pytest.approx(3.1)
    assert seen.waited_s == 3.0
    assert (seen.threads, seen.busy, seen.allowed) == (3, 2, 2)
