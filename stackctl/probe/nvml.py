"""Facts and state of GPUs from NVIDIA's library; facts also from the nvml.json of a recording."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from stackctl.errors import NotInstalled, StackctlError
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.probe.background import Background
from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.values.base import Value, from_json
from stackctl.values.diagnosis import ClockLimit, GpuStatus

#: Without its persistence daemon, the driver takes seconds to load for an unused GPU.
_PATIENCE_S = 15.0
#: The library's value for "not available" (NVML_VALUE_NOT_AVAILABLE).
_NO_VALUE = 2**64 - 1
_MOST_PROCESSES = 64
#: Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) for reasons that slow a busy GPU. Bits
#: for idleness, for a clock set by an administrator and for display settings are left out.
_REASONS: tuple[tuple[int, ClockLimit], ...] = (
    (0x4, "power-limit"),
    (0x8, "hardware"),
    (0x20, "heat-software"),
    (0x40, "heat-hardware"),
    (0x80, "power-brake"),
)


class NvmlProcess(Value, frozen=True, kw_only=True):
    """A process that uses a GPU."""

    pid: int
    command: str | None = None
    memory_bytes: int | None = None


class NvmlDevice(Value, frozen=True, kw_only=True):
    """One GPU as the library reports it; the domain of its PCI address has eight digits.

    ``processes`` is None if the driver does not list them.
    """

    name: str | None = None
    uuid: str | None = None
    pci: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: str | None = None
    power_limit_w: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    memory_bus_bits: int | None = None
    memory_clock_mhz: int | None = None
    processes: tuple[NvmlProcess, ...] | None = None


class NvmlReadings(Value, frozen=True, kw_only=True):
    """All GPUs in the library's order, and the versions of driver and CUDA."""

    driver: str | None = None
    cuda: str | None = None
    devices: tuple[NvmlDevice, ...] = ()


class Nvml:
    """A query of the library beside the rest of the probe, because it may take seconds."""

    def __init__(self, reader: FactReader) -> None:
        #: The reason why there are no readings; None if there are.
        self.error: str | None = None
        #: True if the Python package nvidia-ml-py is not installed.
        self.package_missing = False
        self._answer = Background(functools.partial(_read, reader), _PATIENCE_S)

    def readings(self) -> NvmlReadings | None:
        """Wait for the readings and return them; None if there are none, with ``error`` set."""
        try:
            readings = self._answer.result()
        except StackctlError as error:
            self.error = error.message
            self.package_missing = isinstance(error, NotInstalled)
            return None
        if readings is None:
            self.error = f"the driver does not answer within {_PATIENCE_S:.0f} s"
        return readings


def _read(reader: FactReader) -> NvmlReadings:
    if isinstance(reader.machine, RecordedMachine):
        text = reader.text("/nvml.json")
        if text is None:
            raise StackctlError("the recording holds no nvml.json")
        return from_json(text, NvmlReadings, where="nvml.json")
    # Without the driver's device the library has no answers, so it is not loaded.
    if not reader.exists("/dev/nvidiactl") and not reader.exists("/dev/dxg"):
        raise StackctlError("no NVIDIA driver is loaded (/dev/nvidiactl is absent)")
    return read_nvml()


def read_nvml() -> NvmlReadings:
    """Ask the library of this machine.

    Raises:
        NotInstalled: the Python package is missing.
        StackctlError: the library is missing, finds no driver, or fails.
    """
    with _library() as library:
        cuda = _one(library, library.nvmlSystemGetCudaDriverVersion_v2)
        return NvmlReadings(
            driver=_text(_one(library, library.nvmlSystemGetDriverVersion)),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
            devices=tuple(
                _device(library, library.nvmlDeviceGetHandleByIndex(index))
                for index in range(library.nvmlDeviceGetCount())
            ),
        )


def gpu_status(machine: Machine) -> tuple[GpuStatus, ...]:
    """Return the state of all GPUs at this moment, in the library's order: use, memory, power,
    heat and clock limits; empty without a working driver and library."""
    if not machine.live or not machine.glob("/dev/nvidiactl"):
        return ()
    try:
        with _library() as library:
            count = library.nvmlDeviceGetCount()
            return tuple(_status(library, index) for index in range(count))
    except StackctlError:
        return ()


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """Load and start the library; raises as ``read_nvml``."""
    try:
        # Imported by name, because the package is optional and has no types.
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        raise NotInstalled("the Python package nvidia-ml-py is not installed") from None
    errors = _errors(library)
    try:
        library.nvmlInit()
    except errors as error:
        raise StackctlError(f"NVML does not start: {error}") from None
    try:
        yield library
    except errors as error:
        raise StackctlError(f"NVML fails: {error}") from None
    finally:
        _one(library, library.nvmlShutdown)


def _errors(library: Any) -> tuple[type[Exception], ...]:
    # Some calls raise an error of their own if the driver is older than the package.
    usual: type[Exception] = library.NVMLError
    return usual, getattr(library, "NVMLLibraryMismatchError", usual)


def _one(library: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return one answer; None if this GPU or driver refuses the call."""
    try:
        return call(*arguments)
    except _errors(library):
        return None


def _calls(library: Any, handle: Any) -> Callable[..., Any]:
    """Return a function that calls the library by name for one GPU, like ``_one``."""

    def one(name: str, *arguments: Any) -> Any:
        # An older package lacks newer functions.
        call = getattr(library, name, None)
        return None if call is None else _one(library, call, handle, *arguments)

    return one


def _device(library: Any, handle: Any) -> NvmlDevice:
    one = _calls(library, handle)
    memory = one("nvmlDeviceGetMemoryInfo")
    capability = one("nvmlDeviceGetCudaComputeCapability")
    milliwatts = one("nvmlDeviceGetEnforcedPowerLimit") or one("nvmlDeviceGetPowerManagementLimit")
    address = getattr(one("nvmlDeviceGetPciInfo"), "busId", None)
    return NvmlDevice(
        name=_text(one("nvmlDeviceGetName")),
        uuid=_text(one("nvmlDeviceGetUUID")),
        pci=_text(address),
        memory_bytes=int(memory.total) if memory is not None else None,
        free_bytes=int(memory.free) if memory is not None else None,
        compute_capability="{}.{}".format(*capability) if capability else None,
        power_limit_w=round(milliwatts / 1000) if milliwatts else None,
        # An idle link has a lower generation, so the highest is read. Its width is the slot's.
        pcie_generation=one("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=one("nvmlDeviceGetCurrPcieLinkWidth"),
        memory_bus_bits=one("nvmlDeviceGetMemoryBusWidth"),
        memory_clock_mhz=one("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_MEM),
        processes=_processes(
            one("nvmlDeviceGetComputeRunningProcesses"),
            one("nvmlDeviceGetGraphicsRunningProcesses"),
        ),
    )


def _processes(*lists: Any) -> tuple[NvmlProcess, ...] | None:
    if all(items is None for items in lists):
        return None
    found: dict[int, NvmlProcess] = {}
    for process in [item for items in lists for item in items or ()][:_MOST_PROCESSES]:
        used = getattr(process, "usedGpuMemory", None)
        known = None if used is None or used == _NO_VALUE else int(used)
        found[int(process.pid)] = NvmlProcess(pid=int(process.pid), memory_bytes=known)
    return tuple(found[pid] for pid in sorted(found))


def _status(library: Any, index: int) -> GpuStatus:
    one = _calls(library, library.nvmlDeviceGetHandleByIndex(index))
    memory, use = one("nvmlDeviceGetMemoryInfo"), one("nvmlDeviceGetUtilizationRates")
    drawn, limit = one("nvmlDeviceGetPowerUsage"), one("nvmlDeviceGetEnforcedPowerLimit")
    reasons = one("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = one("nvmlDeviceGetCurrentClocksThrottleReasons")
    running = one("nvmlDeviceGetComputeRunningProcesses")
    return GpuStatus(
        index=index,
        name=_text(one("nvmlDeviceGetName")),
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


def _text(raw: Any) -> str | None:
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8", "replace")
    return sanitize(raw) if isinstance(raw, str) else None
