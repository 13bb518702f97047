"""Facts of GPUs from NVIDIA's library: read live, or from the nvml.json of a recording."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

from stackctl.errors import NotInstalled, StackctlError
from stackctl.machine.machine import RecordedMachine
from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.values.base import Value, from_json

#: Without its persistence daemon, the driver takes seconds to load for an unused GPU.
_PATIENCE_S = 15.0
#: The library's value for "not available" (NVML_VALUE_NOT_AVAILABLE).
_NO_VALUE = 2**64 - 1
_MOST_PROCESSES = 64


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
        self._readings: NvmlReadings | None = None
        self._thread: threading.Thread | None = None
        if not isinstance(reader.machine, RecordedMachine):
            # Without the driver's device the library has no answers, so it is not loaded.
            if reader.exists("/dev/nvidiactl") or reader.exists("/dev/dxg"):
                self._give_up = time.monotonic() + _PATIENCE_S
                self._thread = threading.Thread(target=self._ask, daemon=True)
                self._thread.start()
            else:
                self.error = "no NVIDIA driver is loaded (/dev/nvidiactl is absent)"
            return
        text = reader.text("/nvml.json")
        if text is None:
            self.error = "the recording holds no nvml.json"
            return
        try:
            self._readings = from_json(text, NvmlReadings, where="nvml.json")
        except StackctlError as error:
            self.error = error.message

    def _ask(self) -> None:
        try:
            self._readings = read_nvml()
        except StackctlError as error:
            self.error = error.message
            self.package_missing = isinstance(error, NotInstalled)

    def readings(self) -> NvmlReadings | None:
        """Wait for the readings and return them; None if there are none, with ``error`` set."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._give_up - time.monotonic()))
            if self._thread.is_alive():
                self.error = f"the driver does not answer within {_PATIENCE_S:.0f} s"
                return None
        return self._readings


def read_nvml() -> NvmlReadings:
    """Ask the library of this machine.

    Raises:
        NotInstalled: the Python package is missing.
        StackctlError: the library is missing, finds no driver, or fails.
    """
    try:
        # Imported by name, because the package is optional and has no types.
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        raise NotInstalled("the Python package nvidia-ml-py is not installed") from None
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        raise StackctlError(f"NVML does not start: {error}") from None
    try:
        return _all(library)
    except library.NVMLError as error:
        raise StackctlError(f"NVML fails: {error}") from None
    finally:
        _one(library, library.nvmlShutdown)


def _all(library: Any) -> NvmlReadings:
    cuda = _one(library, library.nvmlSystemGetCudaDriverVersion_v2)
    return NvmlReadings(
        driver=_text(_one(library, library.nvmlSystemGetDriverVersion)),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        devices=tuple(
            _device(library, library.nvmlDeviceGetHandleByIndex(index))
            for index in range(library.nvmlDeviceGetCount())
        ),
    )


def _device(library: Any, handle: Any) -> NvmlDevice:
    def one(name: str, *arguments: Any) -> Any:
        # An older package lacks newer functions.
        call = getattr(library, name, None)
        return None if call is None else _one(library, call, handle, *arguments)

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


def _one(library: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return one answer; None if this GPU or driver refuses the call."""
    # Some calls raise an error of their own if the driver is older than the package.
    older = getattr(library, "NVMLLibraryMismatchError", library.NVMLError)
    try:
        return call(*arguments)
    except (library.NVMLError, older):
        return None


def _text(raw: Any) -> str | None:
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8", "replace")
    return sanitize(raw) if isinstance(raw, str) else None
