"""What declared stacks take of a machine, so that the next plan leaves it to them."""

from __future__ import annotations

from stackctl.values.base import Value
from stackctl.values.cpulist import CpuList


class GpuShare(Value, frozen=True, kw_only=True):
    """Memory that a stack takes of one GPU, by the GPU's index."""

    index: int
    bytes: int


class Claim(Value, frozen=True, kw_only=True):
    """One stack's share: CPUs (kernel list), main memory, GPU memory and its ports.

    ``mems`` are the NUMA nodes its main memory is bound to; empty when it may lie on any.
    """

    stack: str
    cpus: CpuList = CpuList()
    mems: CpuList = CpuList()
    memory_bytes: int = 0
    gpus: tuple[GpuShare, ...] = ()
    port: int | None = None
    engine_port: int | None = None
