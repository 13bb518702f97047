"""Other kernels for models whose usual ones compute wrongly on some GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.values.host import Gpu
from stackctl.values.model import Model

#: The GPUs on which some nvfp4 kernels compute wrongly, or not at all: RTX PRO 6000 and RTX 50
#: (Blackwell, except the GPUs for data centres).
_SM_120 = "12.0"
#: Kernels that compute in 16 bits.
_MARLIN = "marlin"


def fallback_kernels(model: Model, gpus: Sequence[Gpu]) -> tuple[tuple[str, str], ...]:
    """Return options (name, value) for other kernels of a model on these GPUs; empty for none."""
    if not model.is_nvfp4 or not gpus:
        return ()
    if any(gpu.compute_capability != _SM_120 for gpu in gpus):
        return ()
    names = ("linear-backend", "moe-backend") if model.experts else ("linear-backend",)
    return tuple((name, _MARLIN) for name in names)
