"""Facts read from an engine image once, and speeds measured on this machine."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value


class EngineOption(Value, frozen=True, kw_only=True):
    """One option of an engine's help: its names, and the value it takes (None: a bare flag)."""

    names: tuple[str, ...]
    value: str | None = None


class EngineFacts(Value, frozen=True, kw_only=True):
    """What an image's engine understands.

    ``reference`` is the name it was last asked for by, ``pinned`` the digest or ID that units use,
    ``seen`` when (UTC, ISO 8601).
    ``program`` is what starts the engine in it: empty when the image's entry point does.
    ``entrypoint`` replaces an entry point that has more words than the program.
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


class Calibration(Value, frozen=True, kw_only=True):
    """What this machine achieved with one engine, kind of weights and number of threads.

    ``decode_bytes_s`` is active weight bytes times tokens a second in generation,
    ``prefill_flops`` the operations of prompts; both follow from the speeds that were seen.
    ``gpu`` is the name of the GPU that did the work; ``threads`` is then 0.
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


class Seen(Value, frozen=True, kw_only=True):
    """What an engine said of its memory when a generation was ready; None: nothing.

    ``argv`` are its arguments, ``gpus`` name and memory of each GPU it ran on. ``weights_bytes``
    and ``kv_bytes`` lie on each of them (without any in main memory); ``kv_tokens`` is what the KV
    cache holds in all.
    """

    generation: int
    argv: tuple[str, ...]
    gpus: tuple[tuple[str | None, int | None], ...] = ()
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None


class Learned(Value, frozen=True, kw_only=True):
    """Engine options (NAME=VALUE) with which an image gave sane answers on a GPU of that name, and
    without which it did not; ``why`` is what was seen, ``seen`` when (UTC, ISO 8601)."""

    image_id: str
    gpu: str | None = None
    options: tuple[str, ...]
    why: str
    seen: str


class LearnedOptions(Value, frozen=True, kw_only=True):
    """All that was learned on one machine."""

    schema: Literal["stackctl.learned/1"] = "stackctl.learned/1"
    entries: tuple[Learned, ...] = ()
