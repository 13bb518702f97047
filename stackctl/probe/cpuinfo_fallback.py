"""The processor's name and instruction sets from py-cpuinfo, if /proc/cpuinfo lacks them."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec

from stackctl.machine.runner import controlled_environment
from stackctl.probe.cpuinfo import isa
from stackctl.probe.fact_reader import sanitize
from stackctl.values.host import Cpu

_PATIENCE_S = 5.0


class CpuInfoFallback:
    """A query of py-cpuinfo in the background: it starts processes and takes about a second."""

    def __init__(self) -> None:
        self._answer: dict[str, Any] = {}
        self._give_up = time.monotonic() + _PATIENCE_S
        # py-cpuinfo searches the programs that it starts in PATH.
        os.environ["PATH"] = controlled_environment()["PATH"]
        # A daemon thread does not keep stackctl from ending if the answer never comes.
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            import cpuinfo

            self._answer = dict(cpuinfo.get_cpu_info())
        except (Exception, SystemExit):
            # py-cpuinfo raises plain Exception on unknown architectures.
            self._answer = {}

    def complete(self, cpu: Cpu) -> Cpu:
        """Return ``cpu`` with name and instruction sets filled in if the kernel gave none."""
        self._thread.join(max(0.0, self._give_up - time.monotonic()))
        brand, flags = self._answer.get("brand_raw"), self._answer.get("flags")
        if cpu.model is None and isinstance(brand, str):
            cpu = msgspec.structs.replace(cpu, model=sanitize(brand))
        if not cpu.isa and isinstance(flags, list):
            cpu = msgspec.structs.replace(cpu, isa=isa(str(flag) for flag in flags))
        return cpu
