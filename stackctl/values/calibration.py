"""Speeds measured on this machine, for predictions."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class Calibration(Value, frozen=True, kw_only=True):
    """The measured speed of this machine with one engine, quantisation and number of threads.

    ``decode_bytes_s`` is active weight bytes times tokens per second in generation,
    ``prefill_flops`` the arithmetic operations per second in prompts; both are computed from the
    measured tokens per second. ``gpu`` is the name of the GPU (None: the CPU did the work); with a
    GPU ``threads`` is 0.
    """

    engine: str
    quantization: str
    threads: int
    moe: bool = False
    gpu: str | None = None
    decode_bytes_s: float
    prefill_flops: float
    decode_tok_s: float
    prefill_tok_s: float
    model: str
    image_id: str
    measured: str


class Calibrations(Value, frozen=True, kw_only=True):
    """All calibrations of one machine."""

    schema: Literal["stackctl.calibrations/1"] = "stackctl.calibrations/1"
    entries: tuple[Calibration, ...] = ()
