"""``stackctl calibrate``."""

from __future__ import annotations

import click

from stackctl.cli.session import (
    Session,
    overrides,
    plan_options,
    profile_argument,
    timeout_option,
    verb,
)


@verb("calibrate")
@profile_argument
@plan_options
@click.option("--threads", type=click.IntRange(1, 4096), help="Instead of the plan's threads.")
@timeout_option("How long the benchmark may take; default 5m.")
def command(
    session: Session,
    profile: str,
    sets: tuple[str, ...],
    model: str | None,
    objective: str | None,
    name: str | None,
    threads: int | None,
    timeout: float | None,
) -> None:
    """Measure what this machine achieves with PROFILE's model.

    llama.cpp by its own llama-bench: stop other load first. vLLM by the counters of the engine that
    runs on the profile's port. Plans of similar models then say "measured", not "estimated".
    """
    from stackctl.observe.calibrate import calibrate

    resolved = session.profiles().resolve(profile, overrides(sets, model, objective, name))
    entry = calibrate(session.context(), resolved, timeout_s=timeout or 300, threads=threads)
    if session.out.json:
        session.out.data(entry)
        return
    where = entry.gpu or f"{entry.threads} threads"
    session.out.line(f"{entry.model} · {entry.quantization} · {where}")
    session.out.line(
        f"  generation  {entry.decode_tok_s:.3g} tok/s, {entry.decode_bytes_s / 1e9:.3g} GB/s"
    )
    session.out.line(
        f"  prompt      {entry.prefill_tok_s:.3g} tok/s, {entry.prefill_flops / 1e12:.3g} TFLOP/s"
    )
