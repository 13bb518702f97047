"""Measures what this machine achieves with the engine's own benchmark (llama-bench)."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from stackctl.deploy import images, preflight
from stackctl.deploy.context import Context
from stackctl.deploy.plan_inputs import inputs_before_image, read_basis, with_image
from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts, uses_gpu
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import http, podman
from stackctl.plan.placement import place
from stackctl.plan.roofline import prefill_operations
from stackctl.plan.solve import solve
from stackctl.probe import probe
from stackctl.sources.models import read_model
from stackctl.state import calibrations
from stackctl.state.generations import now
from stackctl.units import quoting
from stackctl.values.measured import Calibration
from stackctl.values.model import Model
from stackctl.values.profile import Profile

#: Tokens of prompt and of generation in one run: long enough to settle, short enough to wait for.
PROMPT_TOKENS = 512
GENERATED_TOKENS = 64
_BENCH = "llama-bench"
#: Fewer tokens than this say nothing about a speed.
_LEAST_TOKENS = 64
_COUNTED = ("count", "sum")
_SAMPLE = re.compile(
    r"^vllm:(?P<name>\w+)(?:\{[^}]*\})? (?P<value>[0-9.]+(?:e[+-]?\d+)?)$", re.MULTILINE
)


def calibrate(
    context: Context, profile: Profile, *, timeout_s: float, threads: int | None = None
) -> Calibration:
    """Run the benchmark once with the plan's threads and store what it achieved.

    Raises:
        StackctlError: exit 2 for a profile of another engine, 6 when the image lacks the benchmark.
    """
    if profile.engine == "vllm":
        return _from_running(context, profile)
    if uses_gpu(profile):
        raise StackctlError(
            f"{profile.name} runs llama.cpp on a GPU: nothing to calibrate yet",
            hint="a CPU profile: stackctl calibrate cpu --model SOURCE",
            exit_code=ExitCode.USAGE,
        )
    basis = read_basis(context.paths, context.machine)
    preflight.require_tools(basis.host)
    model = read_model(preflight.require_model(profile))
    preflight.require_files(model)
    engine = find_engine(profile.engine)
    image = images.ready_image(context, profile, engine)
    # The benchmark has the machine to itself.
    alone = dataclasses.replace(basis, claims=())
    inputs = inputs_before_image(alone, profile, model)
    inputs = with_image(alone, inputs, profile, model, image.planned)
    plan = solve(host=basis.host, model=model, profile=profile, known=inputs)
    planned = next((d.value for d in plan.decisions if d.field == "threads"), None)
    count = threads or (planned if isinstance(planned, int) else 1)
    context.report.progress("measure", f"llama-bench with {count} threads")
    runs = _bench(image.image.id, model, count, timeout_s)
    entry = calibration_of(runs, model, engine.name, image.image.id, count)
    calibrations.add(context.paths.state, entry)
    return entry


def _from_running(context: Context, profile: Profile) -> Calibration:
    """vLLM has no such benchmark beside the server: its counters tell what it achieved so far."""
    host = probe(context.machine, scope=context.paths.scope)
    gpus = place(host, profile).gpus
    model = read_model(preflight.require_model(profile))
    url = endpoint.base_url(profile.port or 8080) + "/metrics"
    answer = http.get(url)
    if isinstance(answer, http.NoAnswer) or answer.status != 200:
        seen = answer.reason if isinstance(answer, http.NoAnswer) else f"HTTP {answer.status}"
        raise StackctlError(
            f"no metrics from {url}: {seen}",
            hint="vLLM is measured while it runs: start it, send it requests, then calibrate",
            exit_code=ExitCode.NOT_RUNNING,
        )
    entry = calibration_of_metrics(answer.text, model, gpus[0].name if gpus else None)
    calibrations.add(context.paths.state, entry)
    return entry


def calibration_of_metrics(text: str, model: Model, gpu: str | None) -> Calibration:
    """What vLLM's counters mean in bytes and operations a second, for one request at a time."""
    totals: dict[str, float] = {}
    for match in _SAMPLE.finditer(text):
        totals[match["name"]] = totals.get(match["name"], 0.0) + float(match["value"])
    tokens, seconds = (totals.get(f"inter_token_latency_seconds_{k}", 0.0) for k in _COUNTED)
    computed = totals.get("prompt_tokens_total", 0.0)
    computed -= totals.get("prompt_tokens_cached_total", 0.0)
    prefill_s = totals.get("request_prefill_time_seconds_sum", 0.0)
    prompts = totals.get("request_prefill_time_seconds_count", 0.0)
    if tokens < _LEAST_TOKENS or seconds <= 0 or computed < _LEAST_TOKENS or prefill_s <= 0:
        raise StackctlError(
            f"too little to measure: {tokens:.0f} generated, {computed:.0f} prompt tokens so far",
            hint=f"send requests until there are {_LEAST_TOKENS} of each, then calibrate",
        )
    decode, prefill = tokens / seconds, computed / prefill_s
    mean_prompt = round(computed / max(1.0, prompts))
    return Calibration(
        engine="vllm",
        quantization=model.quantization or "unknown",
        threads=0,
        moe=bool(model.experts),
        gpu=gpu,
        decode_bytes_s=decode * model.active_bytes * model.passes,
        prefill_flops=prefill * prefill_operations(model, mean_prompt),
        decode_tok_s=decode,
        prefill_tok_s=prefill,
        model=model.name or model.source,
        image_id="running",
        measured=now(),
    )


def _bench(image: str, model: Model, threads: int, timeout_s: float) -> list[dict[str, Any]]:
    arguments = (
        "--model", model_mounts.model_path(model),
        "--threads", str(threads), "--n-prompt", str(PROMPT_TOKENS),
        "--n-gen", str(GENERATED_TOKENS), "--repetitions", "3", "--flash-attn", "1",
        "--output", "json",
    )  # fmt: skip
    volumes = [quoting.volume(path, inside, "ro") for path, inside in model_mounts.mounts(model)]
    done = podman.run_once(
        image, arguments, entrypoint=_BENCH, volumes=volumes, timeout_s=timeout_s
    )
    if done.status == 127 or "not found" in done.stderr:
        raise StackctlError(
            f"the image holds no {_BENCH}",
            hint="stackctl image build llama-cpp makes one that does",
            exit_code=ExitCode.HOST,
        )
    try:
        runs = json.loads(done.stdout)
    except ValueError:
        runs = None
    if done.status != 0 or not isinstance(runs, list):
        raise StackctlError(
            f"{_BENCH} failed (exit {done.status})", details=done.stderr.strip().splitlines()[-5:]
        )
    return runs


def calibration_of(
    runs: list[dict[str, Any]], model: Model, engine: str, image_id: str, threads: int
) -> Calibration:
    """What llama-bench's runs mean in bytes and operations a second."""
    speeds = {
        "prompt" if run.get("n_prompt") else "generation": float(run["avg_ts"])
        for run in runs
        if isinstance(run, dict) and isinstance(run.get("avg_ts"), int | float)
    }
    if set(speeds) != {"prompt", "generation"} or min(speeds.values()) <= 0:
        raise StackctlError(f"{_BENCH} printed no speeds for prompt and generation")
    return Calibration(
        engine=engine,
        quantization=model.quantization or "unknown",
        threads=threads,
        moe=bool(model.experts),
        decode_bytes_s=speeds["generation"] * model.active_bytes * model.passes,
        prefill_flops=speeds["prompt"] * prefill_operations(model, PROMPT_TOKENS),
        decode_tok_s=speeds["generation"],
        prefill_tok_s=speeds["prompt"],
        model=model.name or model.source,
        image_id=image_id,
        measured=now(),
    )
