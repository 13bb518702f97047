"""Measured speeds: what llama-bench says, which measurement a plan uses; memory against reality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, EPYC_GPU, IQUEST, LATENCY, MIB, THROUGHPUT, plan, profile, shipped

from stackctl.cli.main import run
from stackctl.engines.llamacpp import metrics as benchmark
from stackctl.engines.llamacpp.metrics import GENERATED_TOKENS, PROMPT_TOKENS
from stackctl.engines.vllm import metrics as counters
from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.calibrate import calibration_of
from stackctl.plan.planner import PlanInputs, make_plan
from stackctl.plan.roofline import prefill_operations
from stackctl.sources.catalogue import read_entry
from stackctl.state import learned_facts
from stackctl.values.engine_facts import Calibration
from stackctl.values.model import Model, ModelFile
from stackctl.values.plan import Plan

GEMMA = read_entry("gemma-3-270m-q4_k_m")
MOE = read_entry("minimax-m2-229b-a10b-q4_k_m")

#: What llama-bench prints, shortened to the keys that matter and some that do not.
RUNS = json.loads(
    """[
  {"build_commit": "abc", "model_type": "gemma3 270M Q4_K - Medium", "n_threads": 2,
   "n_prompt": 512, "n_gen": 0, "avg_ns": 520000000, "avg_ts": 984.6, "stddev_ts": 3.1,
   "samples_ts": [981.0, 988.2]},
  {"build_commit": "abc", "model_type": "gemma3 270M Q4_K - Medium", "n_threads": 2,
   "n_prompt": 0, "n_gen": 64, "avg_ns": 840000000, "avg_ts": 76.2, "stddev_ts": 0.4,
   "samples_ts": [75.9, 76.5]}
]"""
)


def measured(**changes: Any) -> Calibration:
    base = Calibration(
        engine="llama.cpp",
        quantization="Q5_K_M",
        threads=14,
        decode_bytes_s=350e9,
        prefill_flops=6e12,
        decode_tok_s=12.4,
        prefill_tok_s=70.0,
        model="IQuest",
        image_id="0" * 64,
        measured="2026-11-21T12:00:00Z",
    )
    return msgspec.structs.replace(base, **changes)


# What the benchmark says


def of_runs(runs: list[Any], model: Model, threads: int) -> Calibration:
    speeds = benchmark.parse_speeds(json.dumps(runs))
    assert speeds is not None
    return calibration_of(speeds, model, "llama.cpp", image_id="image", threads=threads)


def test_runs_of_llama_bench() -> None:
    found = of_runs(RUNS, GEMMA, 2)
    assert (found.decode_tok_s, found.prefill_tok_s) == (76.2, 984.6)
    assert found.decode_bytes_s == pytest.approx(76.2 * GEMMA.active_bytes)
    assert found.prefill_flops == pytest.approx(984.6 * prefill_operations(GEMMA, PROMPT_TOKENS))
    assert (found.quantization, found.threads, found.moe) == ("Q4_K_M", 2, False)
    assert of_runs(RUNS, MOE, 2).moe is True
    assert (PROMPT_TOKENS, GENERATED_TOKENS) == (512, 64)


@pytest.mark.parametrize(
    "runs",
    [
        [],
        RUNS[:1],
        RUNS[1:],
        [{"n_prompt": 512}, {"n_gen": 64}],
        [{**RUNS[0], "avg_ts": 0}, RUNS[1]],
        [{**RUNS[0], "avg_ts": "fast"}, RUNS[1]],
        [{**RUNS[0], "avg_ts": None}, RUNS[1]],
        [None, 5, "x"],
    ],
)
def test_a_benchmark_without_speeds(runs: list[Any]) -> None:
    with pytest.raises(StackctlError, match="no speeds"):
        benchmark.parse_speeds(json.dumps(runs))


@pytest.mark.parametrize("text", ["", "error: no model", '{"n_prompt": 512}'])
def test_other_output_of_a_benchmark(text: str) -> None:
    assert benchmark.parse_speeds(text) is None


# Where measurements are kept


def test_measurements_are_kept_and_replaced(tmp_path: Path) -> None:
    assert learned_facts.calibrations(tmp_path) == ()
    first, other = measured(), measured(quantization="Q8_0")
    learned_facts.add_calibration(tmp_path, first)
    learned_facts.add_calibration(tmp_path, other)
    assert learned_facts.calibrations(tmp_path) == (first, other)
    again = measured(decode_bytes_s=1e9)
    learned_facts.add_calibration(tmp_path, again)
    assert learned_facts.calibrations(tmp_path) == (other, again)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "stackctl.calibrations/9"}'])
def test_a_damaged_file_of_measurements_is_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibrations.json").write_text(text)
    assert learned_facts.calibrations(tmp_path) == ()


# Which one a plan uses


def used(*known: Calibration, **more: Any) -> Plan:
    return plan(more.pop("host", EPYC), more.pop("model", IQUEST), LATENCY, calibrations=known)


def test_a_plan_says_that_it_is_measured() -> None:
    assert used().prediction.basis == "estimated"
    made = used(measured())
    assert made.prediction.basis == "measured"
    assert made.prediction.decode_tok_s is not None
    low, high = made.prediction.decode_tok_s
    assert low <= 350e9 / IQUEST.active_bytes <= high


@pytest.mark.parametrize(
    "others",
    [
        (measured(quantization="Q8_0", decode_bytes_s=1e9),),
        (measured(threads=4, decode_bytes_s=1e9),),
        (measured(measured="2025-01-01T00:00:00Z", decode_bytes_s=1e9),),
        (measured(moe=True, decode_bytes_s=1e9, measured="2030-01-01T00:00:00Z"),),
        (measured(engine="vllm", decode_bytes_s=1e9, measured="2030-01-01T00:00:00Z"),),
    ],
)
def test_the_closest_measurement_is_used(others: tuple[Calibration, ...]) -> None:
    alone = used(measured()).prediction
    assert used(measured(), *others).prediction == alone
    assert used(*others, measured()).prediction == alone


def test_the_same_weights_count_before_the_same_threads() -> None:
    weights = measured(threads=13, decode_bytes_s=200e9, decode_tok_s=7.1)
    threads = measured(quantization="Q4_0", decode_bytes_s=100e9, decode_tok_s=3.5)
    assert used(weights, threads).prediction == used(weights).prediction


@pytest.mark.parametrize(
    ("changes", "basis"),
    [
        ({"threads": 14}, "measured"),
        ({"threads": 11}, "measured"),
        ({"threads": 4}, "estimated"),
        ({"threads": 64}, "estimated"),
        # Bytes a token: 28 GB is the model itself.
        ({"decode_tok_s": 350e9 / 5e9}, "measured"),
        ({"decode_tok_s": 350e9 / 0.25e9}, "estimated"),
    ],
)
def test_what_was_measured_otherwise_does_not_carry_over(
    changes: dict[str, Any], basis: str
) -> None:
    assert used(measured(**changes)).prediction.basis == basis


def test_measurements_of_the_cpu_say_nothing_of_a_gpu() -> None:
    wish = shipped("gpu-gguf")
    model = read_entry("iquest-coder-40b-q5_k_m")
    known = (measured(),)
    assert plan(EPYC_GPU, model, wish, calibrations=known).prediction.basis == "estimated"


def test_measurements_of_another_kind_of_model_are_not_used() -> None:
    assert used(measured(moe=True)).prediction.basis == "estimated"
    made = plan(EPYC, MOE, shipped("cpu-moe-batch"), calibrations=(measured(),))
    assert made.prediction.basis == "estimated"


def test_calibrated_on_one_quantisation_right_for_another() -> None:
    """Decode in bytes a second carries over: Q8_0 reads 1.2 times what Q4_K_M does."""
    q4 = of_runs(RUNS, GEMMA, 14)
    q8 = msgspec.structs.replace(GEMMA, quantization="Q8_0", weights_bytes=285_000_000)
    made = used(q4, model=q8)
    assert made.prediction.decode_tok_s is not None
    low, high = made.prediction.decode_tok_s
    expected = 76.2 * GEMMA.active_bytes / q8.active_bytes
    assert low * 0.75 < expected < high * 1.25


# Memory that was measured: resident MiB of llama-server b11669 with Gemma 3 270M Q4_K_M

RESIDENT = [
    ("latency", "f16", 2048, 361),
    ("latency", "f16", 8192, 377),
    ("latency", "f16", 32768, 452),
    ("latency", "q8_0", 2048, 343),
    ("latency", "q8_0", 8192, 352),
    ("latency", "q8_0", 32768, 391),
    ("throughput", "f16", 2048, 491),
    ("throughput", "f16", 8192, 564),
    ("throughput", "f16", 32768, 857),
    ("throughput", "q8_0", 2048, 449),
    ("throughput", "q8_0", 8192, 489),
    ("throughput", "q8_0", 32768, 646),
]


def gemma_file() -> Model:
    """The model as its file tells: the header is resident too."""
    return msgspec.structs.replace(
        GEMMA, files=(ModelFile(path="/srv/models/gemma.gguf", bytes=253_115_424),)
    )


@pytest.mark.parametrize(("objective", "kind", "context", "resident"), RESIDENT)
def test_predicted_memory_is_what_was_resident(
    objective: str, kind: str, context: int, resident: int
) -> None:
    base = LATENCY if objective == "latency" else THROUGHPUT
    made = make_plan(
        host=EPYC,
        model=gemma_file(),
        profile=profile(base, context=context, kv_type=kind),
        inputs=PlanInputs(image="i", image_reason="test"),
    )
    cache = next(d.value for d in made.decisions if d.field == "cache-ram")
    assert isinstance(cache, int)
    predicted = (made.memory.total_bytes - cache * MIB) / MIB
    assert predicted == pytest.approx(resident, rel=0.10)


# Usage


@pytest.mark.parametrize("name", ["gpu-gguf", "hybrid-moe"])
def test_only_what_runs_on_the_cpu_can_be_measured(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(key, str(tmp_path))
    assert run(["--user", "calibrate", name]) == ExitCode.USAGE
    told = capsys.readouterr()
    assert "runs llama.cpp on a GPU: nothing to calibrate yet" in told.err
    assert "stackctl calibrate cpu" in told.err
    assert told.out == ""


# What vLLM's counters say

METRICS = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
vllm:prompt_tokens_total{engine="0",model_name="m"} 48400.0
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 2000.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7952892121710787e+09
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.05",model_name="m"} 7.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 2600.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 1.0e+02
vllm:request_prefill_time_seconds_count{engine="0",model_name="m"} 10.0
vllm:request_prefill_time_seconds_sum{engine="0",model_name="m"} 29.0
"""
NVFP4 = read_entry("iquest-coder-40b-nvfp4")


def test_counters_of_vllm_become_speeds_and_a_measured_plan() -> None:
    card = EPYC_GPU.gpus[0].name
    speeds = counters.parse_speeds(METRICS)
    found = calibration_of(speeds, NVFP4, "vllm", image_id="running", gpu=card)
    assert (found.decode_tok_s, found.prefill_tok_s) == (26.0, 1600.0)
    assert found.gpu == card
    known = PlanInputs(image="i", image_reason="r", calibrations=(found,))
    made = make_plan(host=EPYC_GPU, model=NVFP4, profile=shipped("gpu-nvfp4"), inputs=known)
    assert made.prediction.basis == "measured"
    assert made.prediction.decode_tok_s is not None
    assert made.prediction.decode_tok_s[0] < 26.0 < made.prediction.decode_tok_s[1]
    assert made.prediction.prefill_tok_s is not None
    assert made.prediction.prefill_tok_s[0] < 1600.0 < made.prediction.prefill_tok_s[1]
    # Another card was not measured.
    other = msgspec.structs.replace(found, gpu="Another GPU")
    known = PlanInputs(image="i", image_reason="r", calibrations=(other,))
    made = make_plan(host=EPYC_GPU, model=NVFP4, profile=shipped("gpu-nvfp4"), inputs=known)
    assert made.prediction.basis == "estimated"


@pytest.mark.parametrize("text", ["", "no metrics", METRICS.replace("2600.0", "26.0")])
def test_too_little_traffic_is_no_measurement(text: str) -> None:
    with pytest.raises(StackctlError, match="too little to measure") as caught:
        counters.parse_speeds(text)
    assert "calibrate" in (caught.value.hint or "")
