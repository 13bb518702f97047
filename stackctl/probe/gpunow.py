"""What GPUs do at this moment, as NVML has it: use, memory, power, heat, and what slows them."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from stackctl.machine.files import Machine
from stackctl.values.diagnosis import ClockLimit, GpuNow

#: Bits of nvmlDeviceGetCurrentClocksEventReasons that hold the clock down (nvml.h). Idleness, a
#: clock that was set, and display settings do not count.
_REASONS: tuple[tuple[int, ClockLimit], ...] = (
    (0x4, "power-limit"),
    (0x8, "hardware"),
    (0x20, "heat-software"),
    (0x40, "heat-hardware"),
    (0x80, "power-brake"),
)


def gpus_now(machine: Machine) -> tuple[GpuNow, ...]:
    """All GPUs in the library's order; empty where there is no driver or no library to ask."""
    # Without the driver's device there is nothing to ask, and no need to load anything.
    if not machine.live or not machine.glob("/dev/nvidiactl"):
        return ()
    try:
        # By name: it is an optional package, and not typed.
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return ()
    usual: type[Exception] = library.NVMLError
    errors = (usual, getattr(library, "NVMLLibraryMismatchError", usual))
    try:
        library.nvmlInit()
    except errors:
        return ()
    try:
        count = library.nvmlDeviceGetCount()
        return tuple(_gpu(library, errors, index) for index in range(count))
    except errors:
        return ()
    finally:
        with contextlib.suppress(*errors):
            library.nvmlShutdown()


def _gpu(library: Any, errors: tuple[type[Exception], ...], index: int) -> GpuNow:
    handle = library.nvmlDeviceGetHandleByIndex(index)

    def one(name: str, *arguments: Any) -> Any:
        # An older package lacks what it does not know, an older driver refuses.
        call = getattr(library, name, None)
        try:
            return None if call is None else call(handle, *arguments)
        except errors:
            return None

    memory, use = one("nvmlDeviceGetMemoryInfo"), one("nvmlDeviceGetUtilizationRates")
    drawn, limit = one("nvmlDeviceGetPowerUsage"), one("nvmlDeviceGetEnforcedPowerLimit")
    reasons = one("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = one("nvmlDeviceGetCurrentClocksThrottleReasons")
    name, running = one("nvmlDeviceGetName"), one("nvmlDeviceGetComputeRunningProcesses")
    return GpuNow(
        index=index,
        name=name.decode("utf-8", "replace") if isinstance(name, bytes) else name,
        utilization=use.gpu / 100 if use is not None else None,
        used_bytes=int(memory.used) if memory is not None else None,
        memory_bytes=int(memory.total) if memory is not None else None,
        power_w=drawn / 1000 if drawn else None,
        power_limit_w=limit / 1000 if limit else None,
        temperature_c=one("nvmlDeviceGetTemperature", getattr(library, "NVML_TEMPERATURE_GPU", 0)),
        clock_mhz=one("nvmlDeviceGetClockInfo", getattr(library, "NVML_CLOCK_SM", 1)),
        clock_most_mhz=one("nvmlDeviceGetMaxClockInfo", getattr(library, "NVML_CLOCK_SM", 1)),
        throttled=tuple(reason for bit, reason in _REASONS if reasons and reasons & bit),
        pids=None if running is None else tuple(sorted(int(process.pid) for process in running)),
    )
