"""What must be true before anything is touched."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from samples import CARD, EPYC, EPYC_GPU, GEMMA, GIB, LATENCY, plan, shipped, shipped_model

from stackctl.deploy.preflight import require_free_memory
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.host import Host

NVFP4 = shipped("gpu-nvfp4")
ON_GPU = plan(EPYC_GPU, shipped_model(NVFP4), NVFP4)
ON_CPU = plan(EPYC, GEMMA, LATENCY)


def now(free: int | None = None, available: int | None = None) -> Host:
    """The reference machine with so much free on its GPU and in main memory, in GiB."""
    card = msgspec.structs.replace(CARD, free_bytes=None if free is None else free * GIB)
    main = None if available is None else available * GIB
    memory = msgspec.structs.replace(EPYC.memory, available_bytes=main)
    return msgspec.structs.replace(EPYC_GPU, gpus=(card,), memory=memory)


@pytest.mark.parametrize(
    ("host", "made", "old"),
    [
        # 88 GiB of the GPU are no need of main memory.
        (now(free=94, available=16), ON_GPU, None),
        (now(), ON_GPU, None),
        (now(free=3, available=4), ON_GPU, ON_GPU),
        (now(free=0, available=16), ON_CPU, None),
        (now(available=0), ON_CPU, ON_CPU),
    ],
)
def test_there_is_room(host: Host, made: Any, old: Any) -> None:
    require_free_memory(host, made, old)


@pytest.mark.parametrize(
    ("host", "made", "old", "words", "hint"),
    [
        (now(free=60, available=16), ON_GPU, None, "87.9 GiB of GPU 0, 60 GiB is", "nvidia-smi"),
        (now(free=60, available=16), ON_GPU, ON_CPU, "of GPU 0", "nvidia-smi"),
        (now(free=94, available=1), ON_GPU, None, "6 GiB of memory, 1 GiB is", "ps --sort"),
        (now(free=94, available=0), ON_CPU, None, "of memory, 0 B is available now", "ps --sort"),
    ],
)
def test_there_is_no_room_now(host: Host, made: Any, old: Any, words: str, hint: str) -> None:
    with pytest.raises(StackctlError) as caught:
        require_free_memory(host, made, old)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert words in caught.value.message
    assert hint in (caught.value.hint or "")
