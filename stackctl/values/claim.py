"""Resources that installed stacks reserve, so that the next plan does not use them."""

from __future__ import annotations

from stackctl.values.base import Value
from stackctl.values.cpu_list import CpuList


class GpuShare(Value, frozen=True, kw_only=True):
    """Bytes of one GPU's memory that a stack reserves; the GPU is named by its index."""

    index: int
    bytes: int


class Claim(Value, frozen=True, kw_only=True):
    """The resources of one stack: CPUs (kernel list), main memory, GPU memory and ports.

    ``mems`` are the NUMA nodes that its main memory is bound to; empty if any node may hold it.
    """

    stack: str
    cpus: CpuList = CpuList()
    mems: CpuList = CpuList()
    memory_bytes: int = 0
    gpus: tuple[GpuShare, ...] = ()
    port: int | None = None
    engine_port: int | None = None
