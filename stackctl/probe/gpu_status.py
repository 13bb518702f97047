"""The state of GPUs at this moment, from NVML: use, memory, power, heat and clock limits."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from stackctl.machine.machine import Machine
from stackctl.values.diagnosis import ClockLimit, GpuStatus

#: Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) for reasons that slow a busy GPU. Bits
#: for idleness, for a clock set by an administrator and for display settings are left out.
_REASONS: tuple[tuple[int, ClockLimit], ...] = (
    (0x4, "power-limit"),
    (0x8, "hardware"),
    (0x20, "heat-software"),
    (0x40, "heat-hardware"),
    (0x80, "power-brake"),
)


def gpu_status(machine: Machine) -> tuple[GpuStatus, ...]:
    """Return all GPUs in the library's order; empty without a working driver and library."""
    # Without the driver's device the library has no answers, so it is not loaded.
    if not machine.live or not machine.glob("/dev/nvidiactl"):
        return ()
    try:
        # Imported by name, because the package is optional and has no types.
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


def _gpu(library: Any, errors: tuple[type[Exception], ...], index: int) -> GpuStatus:
    handle = library.nvmlDeviceGetHandleByIndex(index)

    def one(name: str, *arguments: Any) -> Any:
        # An older package lacks newer functions, and an older driver refuses them.
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
    return GpuStatus(
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
