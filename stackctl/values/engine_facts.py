"""Facts of engine images, and speeds and memory sizes measured on this machine."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class EngineOption(Value, frozen=True, kw_only=True):
    """One option in an engine's help: its names, and the value it takes (None: a bare flag)."""

    names: tuple[str, ...]
    value: str | None = None


class EngineFacts(Value, frozen=True, kw_only=True):
    """The engine in an image: its version and the options that it accepts.

    ``reference`` is the name under which the image was inspected last, ``pinned`` the digest or ID
    that units use, ``seen`` the time of the inspection (UTC, ISO 8601). ``program`` is the command
    that starts the engine; it is empty if the image's entry point does. ``entrypoint`` replaces an
    entry point that has more words than the program.
    """

    schema: Literal["stackctl.engine/1"] = "stackctl.engine/1"
    engine: str
    image_id: str
    reference: str
    pinned: str
    seen: str
    version: str | None = None
    program: tuple[str, ...] = ()
    entrypoint: str | None = None
    options: tuple[EngineOption, ...] = ()


class MeasuredMemory(Value, frozen=True, kw_only=True):
    """Memory sizes that an engine reported when a generation was ready; None: not reported.

    ``argv`` are its arguments, ``gpus`` the name and the memory in bytes of each GPU it ran on.
    ``weights_bytes`` and ``kv_bytes`` are for each GPU, or for main memory if ``gpus`` is empty;
    ``kv_tokens`` is the capacity of the whole KV cache.
    """

    generation: int
    argv: tuple[str, ...]
    gpus: tuple[tuple[str | None, int | None], ...] = ()
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None


class EngineWorkaround(Value, frozen=True, kw_only=True):
    """Engine options (NAME=VALUE) that an image needs for correct answers on one kind of GPU.

    ``gpu`` is the name of the GPU. ``why`` is the fault without the options, ``seen`` its time
    (UTC, ISO 8601).
    """

    image_id: str
    gpu: str | None = None
    options: tuple[str, ...]
    why: str
    seen: str


class EngineWorkarounds(Value, frozen=True, kw_only=True):
    """All learned options of one machine."""

    schema: Literal["stackctl.learned/1"] = "stackctl.learned/1"
    entries: tuple[EngineWorkaround, ...] = ()


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
