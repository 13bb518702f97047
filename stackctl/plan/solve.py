"""Host + model + profile + engine facts -> Plan. Nothing here looks at the machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from stackctl.engines import engine as find_engine
from stackctl.engines.engine import Dialect, Engine, Option, Request
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan import memory, placement
from stackctl.quantity import format_bytes
from stackctl.values.host import Host
from stackctl.values.measured import EngineFacts
from stackctl.values.model import Model
from stackctl.values.plan import (
    Decision,
    MemoryBudget,
    Plan,
    Prediction,
    Source,
    Timing,
    Verdict,
)
from stackctl.values.profile import Profile

#: Slowest storage worth waiting for (a hard disk), and the engine's own start.
_READ_BYTES_S = 100e6
_START_S = 120


def solve(
    *,
    host: Host,
    model: Model,
    profile: Profile,
    image: str,
    image_reason: str,
    facts: EngineFacts | None,
    deadline_s: float | None = None,
) -> Plan:
    """Plan one stack.

    Args:
        image: reference of the image to run, and why that one.
        facts: what its engine understands; None plans for the newest known dialect.
        deadline_s: seconds allowed for the start; None derives them from the model's size.

    Raises:
        StackctlError: exit 2 for options the engine lacks, exit 6 for what the host lacks. A plan
            that does not fit is no error here: its verdict says so.
    """
    engine = find_engine(profile.engine)
    dialect = engine.newest if facts is None else Dialect(facts.options, inspected=True)
    placed = placement.place(host, profile)
    limit, why_limit = memory.memory_limit(host, placed.placement)
    port, served = profile.port or 8080, profile.served_name or _served_name(model)
    request = Request(
        host=host,
        model=model,
        profile=profile,
        placement=placed.placement,
        threads=placed.threads,
        threads_batch=placed.threads_batch,
        memory_limit_bytes=limit,
        model_path=f"/models/{_file_name(model)}",
        served_name=served,
        port=port,
    )
    options = _apply_explicit(engine, dialect, engine.choose(request), profile)
    argv, options = _spell(engine, dialect, options)
    budget = memory.budget(engine.footprint(model, options), limit)
    timing = _timing(model, deadline_s)
    return Plan(
        profile=profile.name,
        stack=profile.stack,
        objective=profile.objective,
        engine=engine.name,
        image=image,
        argv=argv,
        placement=placed.placement,
        memory=budget,
        prediction=Prediction(),
        verdict=_verdict(budget, why_limit),
        decisions=(
            Decision(
                field="image",
                value=image,
                reason=image_reason,
                source=_source(profile, "image") if profile.image else "derived",
            ),
            Decision(
                field="dialect",
                value=(facts.version or "unknown version") if facts else "newest known",
                reason="read from the image's own help" if facts else "image not inspected",
                source="measured" if facts else "derived",
            ),
            *placed.decisions,
            *(
                Decision(field=o.name, value=o.value, reason=o.reason, source=o.source)
                for o in options.values()
            ),
            Decision(
                field="start-deadline",
                value=timing.deadline_s,
                reason="--timeout"
                if deadline_s is not None
                else f"{_START_S} s and {format_bytes(model.weights_bytes)} at 100 MB/s",
                source="override" if deadline_s is not None else "derived",
            ),
        ),
        model=model,
        served_name=served,
        port=port,
        memlock_bytes=host.limits.memlock_bytes if _locks(options) else None,
        timing=timing,
    )


def _source(profile: Profile, key: str) -> Source:
    return "override" if key in profile.overrides else "profile"


def _apply_explicit(
    engine: Engine, dialect: Dialect, planned: tuple[Option, ...], profile: Profile
) -> dict[str, Option]:
    """Explicit engine options win over planned ones; what was planned stays visible."""
    options = {option.name: option for option in planned}
    for argument in profile.engine_args:
        name = argument.name
        overridden = f"engine_args.{name}" in profile.overrides
        where = f"--set engine_args.{name}" if overridden else f"profile {profile.name}: {name}"
        known = dialect.find(name)
        aliases = [other[2:] for other in known.names] if known else []
        for one in (name, *aliases):
            if one in engine.reserved:
                raise StackctlError(
                    f"{where}: set by stackctl itself",
                    hint=engine.reserved[one],
                    exit_code=ExitCode.USAGE,
                )
        if known is None and dialect.inspected and argument.values is not None:
            near = difflib.get_close_matches(name, dialect.names(), n=1)
            raise StackctlError(
                f"{where}: this image's {engine.program} has no option --{name}",
                hint=f"did you mean {near[0]}?" if near else f"see {engine.program} --help",
                exit_code=ExitCode.USAGE,
            )
        # An option set by its second name replaces the planned one and keeps its place, but not its
        # name: --no-jinja is the second name of --jinja.
        same = next((other for other in aliases if other in options), name)
        before = options.get(same)
        reason = f"engine_args ({'--set' if overridden else 'profile'})"
        if before is not None and before.values != argument.values:
            shown = "nothing" if before.values is None else before.value
            reason += f"; the plan had {shown}: {before.reason}"
        options[same] = Option(
            name, argument.values, reason, "override" if overridden else "profile"
        )
    return options


def _spell(
    engine: Engine, dialect: Dialect, options: Mapping[str, Option]
) -> tuple[tuple[str, ...], dict[str, Option]]:
    argv = [engine.program]
    kept: dict[str, Option] = {}
    for name, option in options.items():
        tokens = engine.spell(option, dialect)
        if tokens is None and (dialect.inspected or dialect.find(name)):
            reason = f"left out: this image has no --{name} ({option.reason})"
            kept[name] = Option(name, None, reason, option.source)
            continue
        if tokens is None:
            # Explicit, and nothing to check it against.
            tokens = tuple(
                token
                for value in option.values or (True,)
                for token in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
            )
        argv.extend(tokens)
        kept[name] = option
    return tuple(argv), kept


def _verdict(budget: MemoryBudget, why_limit: str) -> Verdict:
    if budget.headroom_bytes is None or budget.limit_bytes is None:
        return Verdict(viable=None, fits=None, reasons=(why_limit,))
    need = (
        f"weights {format_bytes(budget.weights_bytes)} + KV cache {format_bytes(budget.kv_bytes)} "
        f"+ engine {format_bytes(budget.compute_bytes)} = {format_bytes(budget.total_bytes)} of "
        f"{format_bytes(budget.limit_bytes)} ({why_limit})"
    )
    if budget.headroom_bytes >= 0:
        return Verdict(viable=None, fits=True, reasons=(need,))
    alternatives = []
    if budget.total_bytes - budget.kv_bytes <= budget.limit_bytes:
        alternatives.append("a smaller context: --set context=N")
    alternatives.append("a smaller or more quantised model: --model SOURCE")
    return Verdict(
        viable=False,
        fits=False,
        reasons=(need, f"{format_bytes(-budget.headroom_bytes)} too much"),
        alternatives=tuple(alternatives),
    )


def _locks(options: Mapping[str, Option]) -> bool:
    mode = options["load-mode"].value if "load-mode" in options else None
    return "mlock" in str(mode) or ("mlock" in options and options["mlock"].values is not None)


def _timing(model: Model, deadline_s: float | None) -> Timing:
    """systemd's ceiling is twice the deadline: it must never fire before stackctl has decided."""
    if deadline_s is None:
        deadline_s = _START_S + model.weights_bytes / _READ_BYTES_S
    deadline = max(1, round(deadline_s))
    return Timing(deadline_s=deadline, ceiling_s=2 * deadline + 60)


def _file_name(model: Model) -> str:
    return model.files[0].path.rpartition("/")[2] if model.files else f"{model.architecture}.gguf"


def _served_name(model: Model) -> str:
    """The file's name without ending and shard number."""
    stem = _file_name(model).removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem)
