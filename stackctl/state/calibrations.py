"""Speeds measured on this machine, ``STATE/calibrations.json``."""

from __future__ import annotations

from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.calibration import Calibration, Calibrations


def read(state: Path) -> tuple[Calibration, ...]:
    """Return all measurements; none when the file is absent or unreadable (calibrate again)."""
    try:
        text = (state / "calibrations.json").read_bytes()
        return from_json(text, Calibrations, where="calibrations.json").entries
    except (OSError, StackctlError):
        return ()


def add(state: Path, entry: Calibration) -> None:
    """Store a measurement; it replaces the one of the same engine, weights, threads and GPU."""

    def key(one: Calibration) -> tuple[object, ...]:
        return (one.engine, one.quantization, one.threads, one.moe, one.gpu)

    kept = [one for one in read(state) if key(one) != key(entry)]
    document = Calibrations(entries=(*kept, entry))
    write_atomically(state / "calibrations.json", to_json(document), mode=0o600)
