"""Predicted speed from bandwidth and arithmetic, as ranges.

Decode: in each pass a token reads every active weight and the KV cache of its context once, so

    seconds = layers * overhead + bytes / (peak bandwidth * achieved fraction)

Prefill: 2 floating-point operations per parameter and token (multiply and add), plus attention:

    seconds = tokens * (2 * active parameters + 2 * layers * width * tokens) / achieved rate

The constants are first guesses, fitted to one owner's measurements (EPYC 9175F with 614 GB/s, RTX
PRO 6000 Blackwell Max-Q with 1.79 TB/s): a dense 40B in nvfp4 25-28 tok/s and 1,100-2,300 tok/s of
prompt, a dense 111B about 11 tok/s, a 7B in fp16 60-80 tok/s; on the CPU a 229B MoE with 10B active
10-37 tok/s, a dense 40B in Q5_K_M tens of seconds for 4,640 tokens. ``stackctl calibrate`` replaces
them with measurements of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.values.engine_facts import Calibration
from stackctl.values.host import Gpu, Host
from stackctl.values.model import Model
from stackctl.values.plan import Placement, Prediction, PromptTime

Range = tuple[float, float]

#: Achieved fraction of the memory's peak in decode.
_CPU_DENSE: Range = (0.55, 0.74)
_CPU_MOE: Range = (0.15, 0.36)
#: Achieved fraction of a measured bandwidth, which excludes the part that no program reaches.
_OF_MEASURED_DENSE: Range = (0.75, 1.0)
_OF_MEASURED_MOE: Range = (0.22, 0.5)
_GPU_16_BIT: Range = (0.62, 0.92)
_GPU_FEWER_BITS: Range = (0.40, 0.62)
#: Seconds for each layer on a CPU besides reading it, for the barriers of its threads. A guess.
_CPU_LAYER_S = 40e-6
#: Bytes per second that one core can read: a few cores cannot saturate twelve channels.
_CORE_BYTES_S: Range = (25e9, 50e9)
#: Factor of decode over several NUMA nodes, where threads read pages of another node. On a dual
#: 9175F placement alone reduced 4.31 tok/s to 2.4.
_NODES_LOSE = 0.75
#: Prefill scales up to so many cores; of more only a share counts (barriers, clock, interconnect).
_SCALING_CORES = 32
_SCALING_SHARE = 0.3
#: Seconds for each layer on a GPU besides reading it: kernel launches, attention, norms.
_GPU_LAYER_S = 105e-6

#: Achieved operations per second and core in prefill, by instruction set, best first.
_CORE_RATES: tuple[tuple[str, Range], ...] = (
    ("amx_int8", (0.40e12, 1.2e12)),
    ("avx512_vnni", (0.27e12, 0.61e12)),
    ("avx_vnni", (0.12e12, 0.30e12)),
    ("avx512f", (0.10e12, 0.26e12)),
    ("i8mm", (0.12e12, 0.30e12)),
    ("avx2", (0.06e12, 0.18e12)),
    ("asimddp", (0.05e12, 0.15e12)),
    ("asimd", (0.02e12, 0.06e12)),
    ("sse4_2", (0.01e12, 0.04e12)),
)
#: Least width of the residual stream for these rates. A model of width 640 reached 0.042e12 per
#: core with AVX-512 VNNI.
_FULL_WIDTH = 4096
#: Dense 16-bit tensor operations per second by name (makers' data sheets), and the fraction that
#: prefill achieves.
_GPU_RATES: tuple[tuple[str, float], ...] = (
    (r"RTX PRO 6000 Blackwell Max-Q", 440e12),
    (r"RTX PRO 6000 Blackwell", 500e12),
    (r"H[12]00", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 5090", 210e12),
    (r"RTX 4090", 165e12),
)
_GPU_PREFILL: Range = (0.20, 0.44)
#: Range around a measured speed, for other prompts and other load.
_MEASURED_SPREAD: Range = (0.85, 1.1)
#: Measured speeds apply to so many times more or fewer threads, and to weights so many times larger
#: or smaller: a small model spends much time on the cost of its layers, a large one hardly any.
_SAME_THREADS = 1.34
_SAME_SIZE = 8


@dataclass(frozen=True)
class RooflineInput:
    """The work of a plan for each token and each prompt.

    ``gpu_bytes`` and ``cpu_bytes`` are the bytes of weights that a token reads on GPUs and in main
    memory. ``kv_token_bytes`` is the KV cache of one token, on the GPU if there is one. ``threads``
    compute prompts, ``decode_threads`` generate; None if unknown.
    """

    model: Model
    cpu_bytes: float
    gpu_bytes: float
    kv_token_bytes: float
    prompt_tokens: int
    threads: int | None
    decode_threads: int | None = None


def predict(
    host: Host, placement: Placement, work: RooflineInput, calibration: Calibration | None = None
) -> Prediction:
    """Predict decode and prefill in tokens per second, and the time to the first token in seconds.

    Parts without a known basis (bandwidth, instruction set, GPU) are None.
    """
    decode = _decode(host, placement, work, calibration)
    prefill = _prefill(host, placement, work, calibration)
    ttft = None
    if prefill is not None:
        slow = work.prompt_tokens / prefill[0] + (1 / decode[0] if decode else 0)
        fast = work.prompt_tokens / prefill[1] + (1 / decode[1] if decode else 0)
        ttft = (_round(fast), _round(slow))
    billions = work.model.parameters / 1e9
    return Prediction(
        decode_tok_s=_rounded(decode),
        prefill_tok_s=_rounded(prefill),
        ttft_s=PromptTime(prompt_tokens=work.prompt_tokens, range=ttft),
        performance_factor=_rounded(
            (decode[0] / billions, decode[1] / billions) if decode and billions else None
        ),
        basis="measured" if calibration is not None else "estimated",
    )


def missing_speed_fact(host: Host, placement: Placement, work: RooflineInput) -> str:
    """Return the fact whose absence keeps ``predict`` from a speed of generation."""
    if work.gpu_bytes:
        gpu = _gpu(host, placement)
        if gpu is None:
            return "GPU unknown"
        if gpu.bandwidth_bytes_s is None:
            return f"memory bandwidth of {gpu.name or 'the GPU'} unknown"
    if not work.gpu_bytes and not work.cpu_bytes:
        return "size of the weights unknown"
    return "memory bandwidth unknown"


def nearest_calibration(
    known: Sequence[Calibration], engine: str, work: RooflineInput, gpus: Sequence[Gpu]
) -> Calibration | None:
    """Return the measurement that is closest to this plan; None if none is near.

    It must have the same engine, GPU and kind of model, a similar size, and on a CPU a similar
    number of threads. Among these the same quantisation is preferred, then the same number of
    threads, then the latest date. Work that is split over GPU and CPU has no measurement.
    """
    if work.gpu_bytes and work.cpu_bytes:
        return None
    gpu = gpus[0].name if work.gpu_bytes and gpus else None
    fitting = [
        one
        for one in known
        if (one.engine, one.gpu, one.moe) == (engine, gpu, bool(work.model.experts))
        and (gpu is not None or _about(one.threads, work.decode_threads, _SAME_THREADS))
        and _about(one.decode_bytes_s, work.model.active_bytes * one.decode_tok_s, _SAME_SIZE)
    ]
    return max(
        fitting,
        key=lambda c: (
            c.quantization == work.model.quantization,
            c.threads == work.decode_threads,
            c.measured,
        ),
        default=None,
    )


def _about(measured: float, planned: float | None, times: float) -> bool:
    """Return True if two values differ by a factor of ``times`` at most, or one is unknown."""
    return planned is None or max(measured, planned) <= times * min(measured, planned)


def _decode(
    host: Host, placement: Placement, work: RooflineInput, calibration: Calibration | None
) -> Range | None:
    """Return tokens per second, slow and fast; the slow end reads the KV cache of a whole prompt,
    on the GPU if there is one."""
    passes, cache = work.model.passes, work.kv_token_bytes * work.prompt_tokens
    slow = fast = 0.0
    for read, kv, layer_s, bandwidth in (
        (work.gpu_bytes, cache, _GPU_LAYER_S, _gpu_bandwidth),
        (work.cpu_bytes, 0.0 if work.gpu_bytes else cache, _CPU_LAYER_S, _cpu_bandwidth),
    ):
        if not read:
            continue
        rate = bandwidth(host, placement, work, calibration)
        if rate is None:
            return None
        # A measured rate includes the cost of the layers.
        overhead = 0.0 if calibration is not None else work.model.layers * passes * layer_s
        slow += overhead + (read * passes + kv) / rate[0]
        fast += overhead + read * passes / rate[1]
    return (1 / slow, 1 / fast) if fast > 0 else None


def _gpu_bandwidth(
    host: Host, placement: Placement, work: RooflineInput, calibration: Calibration | None
) -> Range | None:
    """Return the bytes per second that decode achieves on GPUs; None if unknown."""
    gpu = _gpu(host, placement)
    if gpu is None or gpu.bandwidth_bytes_s is None:
        return None
    if calibration is not None:
        return _times(calibration.decode_bytes_s, _MEASURED_SPREAD)
    bits = work.model.weights_bytes * 8 / max(1, work.model.parameters)
    peak = gpu.bandwidth_bytes_s * max(1, len(placement.gpus))
    return _times(peak, _GPU_16_BIT if bits > 12 else _GPU_FEWER_BITS)


def _cpu_bandwidth(
    host: Host, placement: Placement, work: RooflineInput, calibration: Calibration | None
) -> Range | None:
    """Return the bytes per second that decode achieves in main memory; None if unknown."""
    if calibration is not None:
        return _times(calibration.decode_bytes_s, _MEASURED_SPREAD)
    moe = bool(work.model.experts)
    peak = host.memory.bandwidth_bytes_s
    nodes = [node for node in host.cpu.numa if node.memory_bytes]
    share = 1.0
    if placement.mems and len(nodes) > 1:
        share = min(1.0, len(placement.mems) / len(nodes))
    worst = _NODES_LOSE if len(nodes) > 1 and placement.policy != "bind" else 1.0
    if peak.measured is not None:
        whole, (low, high) = peak.measured, _OF_MEASURED_MOE if moe else _OF_MEASURED_DENSE
    elif peak.theoretical is not None:
        whole, (low, high) = peak.theoretical, _CPU_MOE if moe else _CPU_DENSE
    else:
        return None
    rate = whole * low * worst * share, whole * high * share
    if work.decode_threads is None:
        return rate
    slow, fast = (core * work.decode_threads for core in _CORE_BYTES_S)
    return min(rate[0], slow), min(rate[1], fast)


def _prefill(
    host: Host, placement: Placement, work: RooflineInput, calibration: Calibration | None
) -> Range | None:
    """Return prompt tokens per second, slow and fast; GPU and CPU parts have their own rates."""
    operations = prefill_operations(work.model, work.prompt_tokens)
    on_cpu = work.cpu_bytes / max(1.0, work.cpu_bytes + work.gpu_bytes)
    slow = fast = 0.0
    for share, on_gpu in ((1 - on_cpu, True), (on_cpu, False)):
        if share <= 0:
            continue
        if calibration is not None:
            rate: Range | None = _times(calibration.prefill_flops, _MEASURED_SPREAD)
        elif on_gpu:
            rate = _gpu_rate(host, placement)
        else:
            rate = _cpu_rate(host, work.threads, work.model)
        if rate is None:
            return None
        slow += share * operations / rate[0]
        fast += share * operations / rate[1]
    return 1 / slow, 1 / fast


def prefill_operations(model: Model, tokens: int) -> float:
    """Return the operations for each token of a prompt with that many tokens.

    The output layer is computed for the last token only; layers with a sliding window attend to no
    more than the window.
    """
    width = model.embedding or 0
    head = (model.vocabulary or 0) * width
    parameters = max(1, (model.active_parameters or model.parameters) - head)
    sliding = model.kv.sliding_layers if model.kv is not None else 0
    window = (model.kv.sliding_window if model.kv is not None else None) or tokens
    reach = (model.layers - sliding) * tokens + sliding * min(tokens, window)
    return model.passes * (2.0 * parameters + 2.0 * width * reach)


def _cpu_rate(host: Host, threads: int | None, model: Model) -> Range | None:
    if threads is None:
        return None
    # Narrow matrices do not keep the arithmetic units busy.
    share = min(1.0, (model.embedding or _FULL_WIDTH) / _FULL_WIDTH)
    cores = float(min(threads, _SCALING_CORES))
    cores += max(0, threads - _SCALING_CORES) * _SCALING_SHARE
    for name, (low, high) in _CORE_RATES:
        if name in host.cpu.isa:
            return low * cores * share, high * cores * share
    return None


def _gpu(host: Host, placement: Placement) -> Gpu | None:
    return next((gpu for gpu in host.gpus if str(gpu.index) in placement.gpus), None)


def _gpu_rate(host: Host, placement: Placement) -> Range | None:
    gpu = _gpu(host, placement)
    if gpu is None or gpu.name is None:
        return None
    peak = next((rate for name, rate in _GPU_RATES if re.search(name, gpu.name)), None)
    return None if peak is None else _times(peak * max(1, len(placement.gpus)), _GPU_PREFILL)


def _times(value: float, fraction: Range) -> Range:
    return value * fraction[0], value * fraction[1]


def _rounded(pair: Range | None) -> Range | None:
    return None if pair is None else (_round(pair[0]), _round(pair[1]))


def _round(value: float) -> float:
    """Return three significant digits; more would suggest false precision."""
    return float(f"{value:.3g}")
