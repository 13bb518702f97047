"""Measurement of this machine's speed, by an engine's benchmark or by its counters."""

from __future__ import annotations

import dataclasses

from stackctl.deploy import images, preflight
from stackctl.deploy.context import Context
from stackctl.deploy.planning import inputs_before_image, read_basis, with_image
from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts, planned_threads, uses_gpu
from stackctl.engines.protocol import Benchmark, Engine, MeasuredSpeeds, RunningCounters
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import http, podman
from stackctl.plan.placement import choose_placement
from stackctl.plan.planner import make_plan
from stackctl.plan.roofline import prefill_operations
from stackctl.probe import probe
from stackctl.sources.models import read_model
from stackctl.state import learned_facts
from stackctl.state.generations import utc_now
from stackctl.units import quoting
from stackctl.values.engine_facts import Calibration
from stackctl.values.model import Model
from stackctl.values.profile import Profile


def calibrate(
    context: Context, profile: Profile, *, timeout_s: float, threads: int | None = None
) -> Calibration:
    """Measure the speeds of a profile's model and store them for the plans of a scope.

    The engine decides how its speed is measured. A benchmark may take ``timeout_s`` seconds, and
    runs with ``threads`` threads (None: as many as planned).

    Raises:
        StackctlError: exit 2 for a profile that cannot be measured, 6 when the image lacks the
            benchmark, 3 for counters of an engine that does not run.
    """
    engine = find_engine(profile.engine)
    if isinstance(engine.calibration, Benchmark):
        entry = _by_benchmark(context, profile, engine, engine.calibration, timeout_s, threads)
    else:
        entry = _by_counters(context, profile, engine, engine.calibration)
    learned_facts.add_calibration(context.paths.state, entry)
    return entry


def _by_benchmark(
    context: Context,
    profile: Profile,
    engine: Engine,
    benchmark: Benchmark,
    timeout_s: float,
    threads: int | None,
) -> Calibration:
    if uses_gpu(profile):
        raise StackctlError(
            f"{profile.name} runs {engine.title} on a GPU: nothing to calibrate yet",
            hint="a CPU profile: stackctl calibrate cpu --model SOURCE",
            exit_code=ExitCode.USAGE,
        )
    basis = read_basis(context.paths, context.machine)
    preflight.require_tools(basis.host)
    model = read_model(preflight.require_model(profile))
    preflight.require_files(model)
    image = images.ready_image(context, profile, engine)
    # The claims of other stacks are ignored: the benchmark has the machine to itself.
    alone = dataclasses.replace(basis, claims=())
    inputs = inputs_before_image(alone, profile, model)
    inputs = with_image(alone, inputs, profile, model, image.planned)
    plan = make_plan(host=basis.host, model=model, profile=profile, inputs=inputs)
    count = threads or planned_threads(plan) or 1
    context.progress.progress("measure", f"{benchmark.program} with {count} threads")
    speeds = _run(engine, benchmark, image.image.id, model, count, timeout_s)
    return calibration_of(speeds, model, engine.name, image_id=image.image.id, threads=count)


def _run(
    engine: Engine, benchmark: Benchmark, image: str, model: Model, threads: int, timeout_s: float
) -> MeasuredSpeeds:
    """Run the benchmark in a container of the image.

    Raises:
        StackctlError: exit 6 if the image lacks the benchmark; exit 1 if it failed or printed no
            speeds.
    """
    done = podman.run_once(
        image,
        benchmark.arguments(model_mounts.model_path(model), threads),
        entrypoint=benchmark.program,
        volumes=[
            quoting.join_volume(path, at, "ro") for path, at in model_mounts.model_mounts(model)
        ],
        timeout_s=timeout_s,
    )
    if done.status == 127 or "not found" in done.stderr:
        raise StackctlError(
            f"the image holds no {benchmark.program}",
            hint=f"{images.get_image_command(engine, engine.local_image)} makes one that does",
            exit_code=ExitCode.HOST,
        )
    speeds = benchmark.speeds(done.stdout) if done.status == 0 else None
    if speeds is None:
        raise StackctlError(
            f"{benchmark.program} failed (exit {done.status})",
            details=done.stderr.strip().splitlines()[-5:],
        )
    return speeds


def _by_counters(
    context: Context, profile: Profile, engine: Engine, counters: RunningCounters
) -> Calibration:
    """Read the counters of the server on the profile's port; they count from its start."""
    gpus = choose_placement(probe(context.machine, scope=context.paths.scope), profile).gpus
    model = read_model(preflight.require_model(profile))
    url = endpoint.base_url(profile.port or 8080) + counters.path
    answer = http.get(url)
    if isinstance(answer, http.NoAnswer) or answer.status != 200:
        seen = answer.reason if isinstance(answer, http.NoAnswer) else f"HTTP {answer.status}"
        raise StackctlError(
            f"no metrics from {url}: {seen}",
            hint=f"{engine.title} is measured while it runs: start it, send it requests, "
            "then calibrate",
            exit_code=ExitCode.NOT_RUNNING,
        )
    speeds = counters.speeds(answer.text)
    gpu = gpus[0].name if gpus else None
    return calibration_of(speeds, model, engine.name, image_id="running", gpu=gpu)


def calibration_of(
    speeds: MeasuredSpeeds,
    model: Model,
    engine: str,
    *,
    image_id: str,
    threads: int = 0,
    gpu: str | None = None,
) -> Calibration:
    """Return the speeds of a model as a calibration, in bytes and operations per second."""
    return Calibration(
        engine=engine,
        quantization=model.quantization or "unknown",
        threads=threads,
        moe=bool(model.experts),
        gpu=gpu,
        decode_bytes_s=speeds.decode_tok_s * model.active_bytes * model.passes,
        prefill_flops=speeds.prefill_tok_s * prefill_operations(model, speeds.prompt_tokens),
        decode_tok_s=speeds.decode_tok_s,
        prefill_tok_s=speeds.prefill_tok_s,
        model=model.name or model.source,
        image_id=image_id,
        measured=utc_now(),
    )
