"""Steps against each limit, and the facts of the evidence that they need.

Steps that help most for the least change come first.
"""

from __future__ import annotations

import msgspec

from stackctl.diagnose.load_summary import LoadSummary
from stackctl.diagnose.results import deploy_command
from stackctl.engines import context_per_request, planned_threads
from stackctl.engines import engine as find_engine
from stackctl.engines.options import int_option_in_argv
from stackctl.engines.protocol import Engine
from stackctl.values.diagnosis import Evidence, Step

#: Measured by the owner of the reference box: a 40B model in nvfp4, both variants on that box.
_INSTRUCT = "the Instruct variant in nvfp4 gave 25-28 tok/s where the Loop variant gave 0.6-8"

#: The KV cache counts as full from this share on.
FULL = 0.90
#: The longest request is an estimate of the context needed after so many requests.
ENOUGH_REQUESTS = 20

#: Steps for a GPU that heat or its power limit slows down.
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


def deploy_with_settings(evidence: Evidence, *settings: str) -> str:
    """Return the command that deploys this stack again with new settings (KEY=VALUE).

    Other settings stay as in the earlier command. For a log without a stack the command contains
    the placeholder PROFILE.
    """
    return deploy_command(evidence.profile or "PROFILE", evidence.asked, *settings)


def _runs_on_gpu(evidence: Evidence) -> bool | None:
    """Return True if the engine runs on a GPU; None if neither log nor plan shows it."""
    if evidence.log is not None and evidence.log.place is not None:
        return evidence.log.place == "GPU"
    if evidence.plan is not None:
        return bool(evidence.plan.placement.gpus)
    return None


def _engine(evidence: Evidence) -> Engine | None:
    """Return the engine of the plan, else of the log; None without both."""
    if evidence.plan is not None:
        return find_engine(evidence.plan.engine)
    return find_engine(evidence.log.engine) if evidence.log is not None else None


def _argv(evidence: Evidence) -> tuple[str, ...]:
    """Return the planned arguments; none without a plan."""
    return evidence.plan.argv if evidence.plan is not None else ()


def context_tokens(evidence: Evidence) -> int | None:
    """Return the tokens that one request may use, by the plan, else by the log; None: unknown."""
    if evidence.plan is not None:
        return context_per_request(evidence.plan)
    return evidence.log.context if evidence.log is not None else None


def generating_threads(evidence: Evidence) -> int | None:
    """Return the number of generating threads by the plan, else by the log; None: unknown."""
    if evidence.plan is None:
        return evidence.log.threads if evidence.log is not None else None
    return planned_threads(evidence.plan)


def threads_option(evidence: Evidence) -> str | None:
    """Return the option for the number of generating threads; None if the engine has none."""
    engine = _engine(evidence)
    return engine.threads_options[0] if engine is not None and engine.threads_options else None


def rounded_context(tokens: int) -> int:
    """Return a context that is a quarter larger than a sequence, rounded up to 1,024 tokens."""
    return max(1024, -(-tokens * 5 // 4 // 1024) * 1024)


def speed_up_generation(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:
    """Return the steps against slow generation, when prompts and memory are no problem.

    Fewer tokens come first, because they need no change of the stack; then less memory to read for
    each token. On a CPU the first step is a GPU.
    """
    least = (
        _diffs(evidence),
        _COLD,
        _SMALL_MAP,
        smaller_context(evidence, load),
        smaller_model(evidence),
    )
    return least if _runs_on_gpu(evidence) is not False else (*_use_gpu(evidence), *least)


def _use_gpu(evidence: Evidence) -> tuple[Step, ...]:
    engine = _engine(evidence)
    return (engine.advice.use_gpu,) if engine is not None else ()


def _diffs(evidence: Evidence) -> Step:
    """Return the step to diff edits. aider edits whole files with models that it does not know."""
    which = f" {evidence.stack}" if evidence.stack else ""
    return Step(
        do="aider: diff edits instead of whole files", command=f"stackctl client aider{which}"
    )


def smaller_context(evidence: Evidence, load: LoadSummary) -> Step:
    """Return the step to a smaller context, sized by the longest sequence if that is known."""
    engine = _engine(evidence)
    name = engine.context_option if engine is not None else "context"
    now, wanted = context_tokens(evidence), "N"
    if load.longest is not None and now is not None and (load.requests or 0) >= ENOUGH_REQUESTS:
        fits = rounded_context(load.longest)
        if fits >= now:
            return Step(do=f"{name} no larger than needed: {now:,} is, by what was seen")
        wanted = str(fits)
    command = f"--{name} {wanted}"
    if evidence.stack is not None:
        command = deploy_with_settings(evidence, f"context={wanted}")
    return Step(do=f"{name} no larger than needed", command=command)


def smaller_model(evidence: Evidence) -> Step:
    """Return the step to a smaller model, the last resort; for a Loop variant, name the model."""
    if is_looped_model(evidence):
        return Step(
            do=f"then a smaller or quantised model: {_INSTRUCT}",
            command="stackctl up gpu-nvfp4",
        )
    asked = msgspec.structs.replace(evidence.asked, model="SOURCE")
    command = deploy_with_settings(msgspec.structs.replace(evidence, asked=asked))
    return Step(
        do="then a smaller or quantised model (20B-32B)",
        command=command if evidence.stack else None,
    )


def is_looped_model(evidence: Evidence) -> bool:
    """Return True if the model runs its layers more than once for a token."""
    if evidence.plan is not None and evidence.plan.model.passes > 1:
        return True
    names = (
        evidence.plan.model.architecture if evidence.plan else "",
        (evidence.log.architecture or "") if evidence.log else "",
    )
    return any("loopcoder" in name.lower() for name in names)


def speed_up_prompts(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:  # noqa: ARG001
    """Return the steps against slow prompts: a GPU first; on a GPU, fewer tokens to compute."""
    known = Step(do="keep what prompts begin with the same, for the prefix cache")
    if _runs_on_gpu(evidence):
        return (known, _SMALL_MAP, *_larger_steps(evidence))
    engine, command = _engine(evidence), None
    if evidence.plan is None:
        command = engine.advice.small_batches if engine is not None else None
    elif evidence.plan.objective != "latency":
        command = f"stackctl switch latency{_of(evidence)}"
    smaller = Step(do="smaller batches: the first token sooner", command=command)
    return (
        *_use_gpu(evidence),
        *((smaller,) if command else ()),
        Step(do="shorter prompts: " + _SMALL_MAP.do, command=_SMALL_MAP.command),
        known,
        Step(do="then a smaller model (7B-14B)", command="stackctl up cpu-small"),
    )


def _larger_steps(evidence: Evidence) -> tuple[Step, ...]:
    """Return a step to larger batches; empty if they are as large as is useful."""
    engine, argv = _engine(evidence), _argv(evidence)
    large = engine.advice.large_batches if engine is not None else {}
    small = [
        name for name, tokens in large.items() if (int_option_in_argv(argv, name) or 0) < tokens
    ]
    if not small:
        return ()
    command = deploy_with_settings(
        evidence, *(f"engine_args.{name}={large[name]}" for name in small)
    )
    return (Step(do="more prompt tokens a step", command=command),)


def _of(evidence: Evidence) -> str:
    """Return the option that names the stack of a switch; empty if the stack is unknown."""
    return f" --stack {evidence.stack}" if evidence.stack else ""


def shorten_queue(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:
    """Return the steps to more requests at once; with a full KV cache, the steps against that."""
    if is_full(load):
        # More requests at once would only wait for memory.
        return relieve_kv_cache(evidence, load)
    engine, command = _engine(evidence), None
    if evidence.stack is None or evidence.plan is None:
        if engine is not None:
            command = f"a larger --{engine.requests_option}"
    elif evidence.plan.objective != "throughput":
        command = f"stackctl switch throughput{_of(evidence)}"
    else:
        planned = engine and int_option_in_argv(evidence.plan.argv, engine.requests_option)
        command = deploy_with_settings(evidence, f"concurrency={2 * (planned or 1)}")
    return (
        Step(do="serve more requests at once; each then has less of the speed", command=command),
        Step(do="or fewer clients at once"),
    )


def relieve_kv_cache(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:
    """Return the steps to a smaller KV cache: smaller elements, shorter and fewer sequences."""
    engine, smaller = _engine(evidence), tuple[Step, ...]()
    if engine is not None and engine.kv_types and not engine.reduces_kv_cache(_argv(evidence)):
        command = deploy_with_settings(evidence, f"kv_type={engine.kv_types[0]}")
        smaller = (Step(do="a KV cache of 8-bit elements holds twice as much", command=command),)
    return (
        *smaller,
        smaller_context(evidence, load),
        Step(do="fewer requests at once", command=deploy_with_settings(evidence, "concurrency=N")),
    )


def is_full(load: LoadSummary) -> bool:
    """Return True if the KV cache was full or close to it."""
    return load.kv_most is not None and load.kv_most >= FULL


def stabilize_prefix(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:  # noqa: ARG001
    """Return the steps for clients to share a prefix; no setting of the server helps."""
    return (
        Step(do="keep system prompt and tool list fixed, and first in every prompt"),
        Step(do="what changes (dates, file lists, edited files) goes last"),
    )


def oversized_context(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:
    """Return the step to a context of the size that requests need."""
    return (smaller_context(evidence, load),)


def shorten_answers(evidence: Evidence, load: LoadSummary) -> tuple[Step, ...]:  # noqa: ARG001
    """Return the steps to shorter answers, or to a bound for them."""
    return (
        _diffs(evidence),
        Step(do="an upper bound for answers", command='"max_tokens": N in each request'),
    )
