"""Comparison of the engine's own reports and of its GPU memory with the plan."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from stackctl.diagnose.results import Comparison, redeploy_command
from stackctl.engines import context_per_request
from stackctl.engines import engine as find_engine
from stackctl.quantity import format_bytes
from stackctl.values.generation import Generation
from stackctl.values.inspection import Inspection
from stackctl.values.result import Result

#: A KV cache of at least this share of the planned size is as planned: it has whole blocks.
_ENOUGH = 0.95
#: If the GPU holds less than this share of the weights, some layers are computed elsewhere.
_WEIGHTS = 0.8
#: Names of facts about the kernels in use end with this: attention_backend, moe_backend.
_BACKEND = "_backend"


def verify_engine(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare model, context and slots, facts of the log, and GPU memory with the plan."""
    yield _model(generation, inspection)
    yield from _promised(generation, inspection)
    yield from _kv_cache(generation, inspection)
    yield from _quantization(generation, inspection)
    yield from _backends(inspection)
    yield from _gpu(generation, inspection)


def _model(generation: Generation, inspection: Inspection) -> Result:
    served = generation.plan.served_name
    model = Comparison("model", served)
    if inspection.model is None:
        return model.skip_missing(inspection)
    if inspection.model.status == "ok":
        return model.ok(inspection.model.actual or served)
    return msgspec.structs.replace(
        inspection.model,
        evidence=f"asked on the engine's own port, {generation.plan.engine_listen_port}",
        remedy=f"stackctl check {generation.stack}; stackctl restart {generation.stack}",
    )


def _promised(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare the facts that the arguments imply with those that the engine reports over HTTP."""
    said = {fact.name: fact.value for fact in inspection.report}
    for fact in find_engine(generation.plan.engine).expected_facts(generation.plan.argv):
        promised = Comparison(fact.name.replace("_", "-"), fact.value)
        actual = said.get(fact.name)
        if actual is None:
            yield promised.skip("the engine does not tell it over HTTP")
        elif actual == fact.value:
            yield promised.ok(actual)
        else:
            cause = inspection.first_drift or "its arguments, its environment or the model"
            yield promised.fail(actual, cause, redeploy_command(generation))


def _facts(inspection: Inspection) -> dict[str, str]:
    return {fact.name: fact.value for fact in inspection.log}


def _kv_cache(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    plan, facts = generation.plan, _facts(inspection)
    size, tokens = facts.get("kv_cache_bytes"), facts.get("kv_cache_tokens")
    if not find_engine(plan.engine).logs_kv_cache:
        return
    cache = Comparison("kv-cache", format_bytes(plan.memory.kv_bytes))
    if size is None and tokens is None:
        yield cache.skip_missing(inspection, "log")
        return
    parts = [format_bytes(int(size))] if size is not None else []
    parts += [f"{int(tokens):,} tokens"] if tokens is not None else []
    if (many := facts.get("max_concurrency")) is not None:
        parts.append(f"{float(many):,.0f} requests at once")
    actual = ", ".join(parts)
    context = context_per_request(plan)
    if tokens is not None and context is not None and int(tokens) < context:
        room = Comparison("kv-cache", f"{context} tokens")
        yield room.fail(actual, "one whole context does not fit", None)
    elif size is not None and int(size) < _ENOUGH * plan.memory.kv_bytes:
        yield cache.warn(actual, "less room for known prompts: fewer prefix-cache hits")
    else:
        yield cache.ok(actual)


def _quantization(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    said = _facts(inspection).get("quantization")
    if said is None:
        return
    planned = generation.plan.model.quantization_method
    plain = said.lower() in ("none", "null")
    method = Comparison("quantization", planned or ("none" if plain else None))
    if planned is None:
        yield method.ok("none") if plain else method.info(said)
    elif plain:
        yield method.fail(
            "none",
            "the engine did not recognise it: the weights are read as if they were not quantised",
            "a newer image, or engine_args.quantization",
        )
    elif find_engine(generation.plan.engine).is_quantization(planned, said):
        yield method.ok(said)
    else:
        yield method.info(said)


def _backends(inspection: Inspection) -> Iterator[Result]:
    found = [
        f"{fact.name.removesuffix(_BACKEND)} {fact.value}"
        for fact in inspection.log
        if fact.name.endswith(_BACKEND)
    ]
    if found:
        yield Comparison("backends").info(", ".join(found))


def _gpu(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Check the device of the engine, because engines fall back to the CPU without an error."""
    plan = generation.plan
    planned = [int(index) for index in plan.placement.gpus]
    device = _facts(inspection).get("device")
    if not planned:
        cpu = Comparison("device", "cpu")
        if device == "cpu":
            yield cpu.ok(device)
        elif device is not None:
            remedy = redeploy_command(generation)
            yield cpu.fail(device, "the container has a GPU it should not", remedy)
        return
    total_bytes = plan.memory.total_bytes
    gpus = Comparison("gpu", f"{format_bytes(total_bytes)} of GPU {', '.join(plan.placement.gpus)}")
    fallen = "the engine computes on the CPU: its image has no code for GPUs, or the container has "
    fallen += "no device"
    doctor = f"stackctl doctor {plan.profile}; stackctl logs {generation.stack}"
    if device == "cpu":
        yield gpus.fail("none: its log says cpu", fallen, doctor)
        return
    if inspection.gpus is None:
        yield gpus.skip_missing(inspection)
        return
    empty = [index for index in planned if all(use.gpu != index for use in inspection.gpus)]
    if empty:
        actual = f"no process of it holds memory of GPU {', '.join(map(str, empty))}"
        yield gpus.fail(actual, fallen, doctor)
        return
    sizes = [use.memory_bytes for use in inspection.gpus if use.gpu in planned]
    if any(size is None for size in sizes):
        yield gpus.info("it holds GPU memory; how much the driver does not tell")
        return
    total = sum(size or 0 for size in sizes)
    actual = f"{format_bytes(total)} of {format_bytes(total_bytes)} planned"
    if total < _WEIGHTS * plan.memory.weights_bytes:
        yield gpus.fail(actual, "less than its weights: layers are elsewhere", doctor)
    elif total > total_bytes * 1.05:
        yield gpus.warn(actual, "other stacks on this GPU have less room than planned")
    else:
        yield gpus.ok(actual)
