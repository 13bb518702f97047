"""The document ``stackctl.profiles/1``: the profiles, and how each of them would run here."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.plan import PromptTime


class ProfileSummary(Value, frozen=True, kw_only=True):
    """One profile, planned for a machine without its image.

    ``fits`` and ``viable`` are those of the plan's verdict (None: unknown), ``decode_tok_s`` and
    ``ttft_s`` its predicted speed; ``ttft_slo_s`` is the profile's objective for the latter.
    ``reason`` is the reason why the profile cannot be planned or is refused.

    ``fetched_from`` is the source that ``up`` fetches, and ``download_bytes`` the size of the model
    there: 0 if the model is on this machine, None if it is unknown or cannot be fetched.
    ``memory_bytes`` is the planned memory of the ``pool`` that holds the weights. A profile that is
    not valid has only ``name``, and the error as its ``description``; ``stack`` and ``objective``
    are then "-".
    """

    name: str
    stack: str
    objective: str
    description: str
    engine: str | None = None
    model: str | None = None
    on_gpu: bool | None = None
    parameters: int | None = None
    fits: bool | None = None
    viable: bool | None = None
    reason: str | None = None
    decode_tok_s: tuple[float, float] | None = None
    ttft_s: PromptTime | None = None
    ttft_slo_s: float | None = None
    pool: str | None = None
    memory_bytes: int | None = None
    limit_bytes: int | None = None
    fetched_from: str | None = None
    download_bytes: int | None = None
    recommended: bool = False


class ProfileList(Value, frozen=True, kw_only=True):
    """Results of ``stackctl profiles``; at most one of them is recommended."""

    schema: Literal["stackctl.profiles/1"] = "stackctl.profiles/1"
    profiles: tuple[ProfileSummary, ...]
