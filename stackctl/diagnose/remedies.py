"""What to do about each limit, in the order that helps most for the least change."""

from __future__ import annotations

import msgspec

from stackctl.diagnose.load import Load
from stackctl.diagnose.telling import (
    at_once,
    context_tokens,
    engine_name,
    on_gpu,
    rounded_context,
    up,
)
from stackctl.engines.protocol import argument, whole_argument
from stackctl.values.diagnosis import Evidence, Step

#: The owner of the reference box: 40B nvfp4 in vLLM, the same box on which the Loop variant gave
#: 0.6-8 tok/s.
_INSTRUCT = "the Instruct variant in nvfp4 gave 25-28 tok/s where the Loop variant gave 0.6-8"

#: So many must have come before the longest of them says how long they get.
ENOUGH_REQUESTS = 20

_GPU = Step(
    do="use a GPU, if there is one, with llama.cpp too (--n-gpu-layers 999)",
    command="stackctl up gpu-gguf",
)
#: For a GPU that heat, or its power limit, slows down.
COOLING = Step(
    do="cooling: fans, dust, the air it takes in",
    command="nvidia-smi -q -d TEMPERATURE,PERFORMANCE",
)
MORE_POWER = Step(
    do="the power limit, if the card and its supply allow more",
    command="nvidia-smi -q -d POWER",
)
_COLD = Step(do="temperature 0", command='"temperature": 0 in requests')
_SMALL_MAP = Step(
    do="smaller repo map, fewer added files (/drop)", command="aider --map-tokens 1024"
)


def slow_generation(evidence: Evidence, load: Load) -> tuple[Step, ...]:
    """For answers that come slowly while prompts and memory are no problem: fewer tokens first,
    which needs no change of the stack; then less to read for each of them. On a CPU a GPU comes
    before all else."""
    least = (
        _diffs(evidence),
        _COLD,
        _SMALL_MAP,
        smaller_context(evidence, load),
        smaller_model(evidence),
    )
    return least if on_gpu(evidence) is not False else (_GPU, *least)


def _diffs(evidence: Evidence) -> Step:
    """aider edits whole files of models that it does not know."""
    which = f" {evidence.stack}" if evidence.stack else ""
    return Step(
        do="aider: diff edits instead of whole files", command=f"stackctl client aider{which}"
    )


def smaller_context(evidence: Evidence, load: Load) -> Step:
    """As small as the work allows: by the longest sequence that was seen, where it is known."""
    name = "max-model-len" if engine_name(evidence) != "llama.cpp" else "context"
    now, wanted = context_tokens(evidence), "N"
    if load.longest is not None and now is not None and (load.requests or 0) >= ENOUGH_REQUESTS:
        fits = rounded_context(load.longest)
        if fits >= now:
            return Step(do=f"{name} no larger than needed: {now:,} is, by what was seen")
        wanted = str(fits)
    if evidence.stack is None:
        flag = "--max-model-len" if name == "max-model-len" else "--ctx-size"
        return Step(do=f"{name} no larger than needed", command=f"{flag} {wanted}")
    return Step(do=f"{name} no larger than needed", command=up(evidence, f"context={wanted}"))


def smaller_model(evidence: Evidence) -> Step:
    """The last resort. Which one is known where the Loop variant runs."""
    if runs_loop(evidence):
        return Step(
            do=f"then a smaller or quantised model: {_INSTRUCT}",
            command="stackctl up gpu-nvfp4",
        )
    return Step(
        do="then a smaller or quantised model (20B-32B)",
        command=_with_another_model(evidence) if evidence.stack else None,
    )


def _with_another_model(evidence: Evidence) -> str:
    asked = msgspec.structs.replace(evidence.asked, model="SOURCE")
    return up(msgspec.structs.replace(evidence, asked=asked))


def runs_loop(evidence: Evidence) -> bool:
    """Whether the model runs its layers more than once for a token."""
    if evidence.plan is not None and evidence.plan.model.passes > 1:
        return True
    names = (
        evidence.plan.model.architecture if evidence.plan else "",
        (evidence.log.architecture or "") if evidence.log else "",
    )
    return any("loopcoder" in name.lower() for name in names)


def slow_prompts(evidence: Evidence) -> tuple[Step, ...]:
    """A GPU first, where none is used; on one, what need not be computed."""
    known = Step(do="keep what prompts begin with the same, for the prefix cache")
    if on_gpu(evidence):
        return (known, _SMALL_MAP, *_larger_steps(evidence))
    steps = [
        _GPU,
    ]
    if evidence.plan is not None and evidence.plan.objective != "latency":
        steps.append(
            Step(
                do="batch 512, ubatch 128: the first token sooner",
                command=f"stackctl switch latency{_of(evidence)}",
            )
        )
    elif evidence.plan is None and engine_name(evidence) == "llama.cpp":
        steps.append(
            Step(
                do="smaller batches: the first token sooner",
                command="--batch-size 512 --ubatch-size 128",
            )
        )
    return (
        *steps,
        Step(do="shorter prompts: " + _SMALL_MAP.do, command=_SMALL_MAP.command),
        known,
        Step(do="then a smaller model (7B-14B)", command="stackctl up cpu-small"),
    )


def _larger_steps(evidence: Evidence) -> tuple[Step, ...]:
    """As the engine calls it; nothing where they are as large already."""
    llama = engine_name(evidence) == "llama.cpp"
    names = ("batch-size", "ubatch-size") if llama else ("max-num-batched-tokens",)
    tokens = 2048 if llama else 16384
    argv = evidence.plan.argv if evidence.plan is not None else ()
    small = [name for name in names if (whole_argument(argv, name) or 0) < tokens]
    if not small:
        return ()
    command = up(evidence, *(f"engine_args.{name}={tokens}" for name in small))
    return (Step(do="more prompt tokens a step", command=command),)


def _of(evidence: Evidence) -> str:
    """Which stack a switch is for, where one needs to be named."""
    return f" --stack {evidence.stack}" if evidence.stack else ""


def long_queue(evidence: Evidence) -> tuple[Step, ...]:
    """More at once, where memory has room for it."""
    if evidence.stack is None or evidence.plan is None:
        command = "a larger --max-num-seqs (vLLM) or --parallel (llama.cpp)"
    elif evidence.plan.objective != "throughput":
        command = f"stackctl switch throughput{_of(evidence)}"
    else:
        command = up(evidence, f"concurrency={2 * (at_once(evidence) or 1)}")
    return (
        Step(do="serve more requests at once; each then has less of the speed", command=command),
        Step(do="or fewer clients at once"),
    )


def full_cache(evidence: Evidence, load: Load) -> tuple[Step, ...]:
    """Less to keep: smaller elements, shorter sequences, fewer of them."""
    llama = engine_name(evidence) == "llama.cpp"
    option, kind = ("cache-type-k", "q8_0") if llama else ("kv-cache-dtype", "fp8")
    now = argument(evidence.plan.argv, option) if evidence.plan is not None else None
    smaller = Step(
        do="a KV cache of 8-bit elements holds twice as much",
        command=up(evidence, f"kv_type={kind}"),
    )
    return (
        # Types of few bits have names such as q8_0, q4_0 and fp8_e4m3.
        *(() if (now or "").startswith(("q", "iq", "fp8")) else (smaller,)),
        smaller_context(evidence, load),
        Step(do="fewer requests at once", command=up(evidence, "concurrency=N")),
    )


#: As a client's settings; no command of the server's helps.
SAME_BEGINNING = (
    Step(do="keep system prompt and tool list fixed, and first in every prompt"),
    Step(do="what changes (dates, file lists, edited files) goes last"),
)


def long_answers(evidence: Evidence) -> tuple[Step, ...]:
    """Shorter ones, or a bound for them."""
    return (
        _diffs(evidence),
        Step(do="an upper bound for answers", command='"max_tokens": N in each request'),
    )
