"""``stackctl calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stackctl.cli.options import duration_option, plan_options, profile_argument
from stackctl.cli.session import Session, stackctl_command

if TYPE_CHECKING:
    from stackctl.values.profile import Overrides

_COLUMN = 14


@stackctl_command("calibrate")
@profile_argument
@plan_options
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Number of threads; default: the plan's."
)
@duration_option("--timeout", "How long the benchmark may take; default 5m.")
def command(
    session: Session,
    profile: str,
    asked: Overrides,
    threads: int | None,
    timeout: float | None,
) -> None:
    """Measure what this machine achieves with PROFILE's model.

    If the engine's image has a benchmark, it is run: stop other load first. Otherwise the
    measurement reads the counters of the engine that runs on the profile's port. Plans of similar
    models are then based on it: "measured", not "estimated".
    """
    from stackctl.observe.calibrate import calibrate
    from stackctl.quantity import format_number

    resolved = session.profiles().resolve(profile, asked)
    entry = calibrate(session.context(), resolved, timeout_s=timeout or 300, threads=threads)
    if session.out.wrote_json(entry):
        return
    where = entry.gpu or f"{entry.threads} threads"
    session.out.line(f"{entry.model} · {entry.quantization} · {where}")
    for name, speed, work in (
        ("generation", entry.decode_tok_s, f"{format_number(entry.decode_bytes_s / 1e9)} GB/s"),
        ("prompt", entry.prefill_tok_s, f"{format_number(entry.prefill_flops / 1e12)} TFLOP/s"),
    ):
        session.out.labelled(
            name, f"{format_number(speed)} tok/s, {work}", indent=2, column=_COLUMN
        )
