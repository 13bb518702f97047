"""Measured memory bandwidth, with the standard library alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from stackctl.values.host import Cpu

#: Far above a core's share of the largest caches (32 MiB), so that nearly all comes from memory.
_BUFFER = 256 * 2**20
#: Of the memory that is available, all buffers together take this part at most.
_SHARE = 0.25
_LEAST_BUFFER = 64 * 2**20
#: Starting, and touching each page once, takes a while where there are many cores.
_GRACE_S = 20.0

#: What each process runs: fill a buffer, say so, wait for the start, search it until the end.
#: A byte that is not there makes bytes.find read everything with memchr, which uses the widest
#: registers of the processor and writes nothing.
_WORKER = """
import sys, time
size, seconds = int(sys.argv[1]), float(sys.argv[2])
buffer = bytearray(b"\\1") * size
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.readline()
start = now = time.monotonic()
done = 0
while now - start < seconds:
    buffer.find(b"\\0")
    done += size
    now = time.monotonic()
print(done / (now - start))
"""


def measure_bandwidth(
    cpu: Cpu, *, available_bytes: int | None = None, seconds: float = 1.0
) -> float | None:
    """Bytes a second that all physical cores together read from memory.

    One process for each physical core that this process may use, bound to it, reads a buffer of
    its own in order, again and again, for the same second; the rates are added. It measures
    sequential reading from memory that is local to the core's NUMA node, which is the best case of
    reading weights; it is no measure of random access, of writing, or of another node's memory.

    Limits: other load lowers it; a core's read rate bounds it where few cores share many channels,
    as it bounds an engine too; with a processor cache larger than the buffers together it is too
    high, so the buffers exceed any L3 known. A cgroup's CPU quota lowers it, as it should.

    Args:
        cpu: the machine's processors; each core's first allowed CPU is used.
        available_bytes: memory that is free; a quarter of it is used at most.
        seconds: how long to read, after the buffers are filled.

    Returns:
        None when it cannot be measured: too little memory, or no process can be started.
    """
    cores = _one_of_each_core(cpu)
    largest = max((domain.bytes or 0 for domain in cpu.l3), default=0)
    total_l3 = sum(domain.bytes or 0 for domain in cpu.l3)
    buffer = max(_BUFFER if len(cores) <= 64 else _BUFFER // 2, 2 * largest // max(1, len(cores)))
    buffer = max(buffer, 2 * total_l3 // max(1, len(cores)))
    if available_bytes is not None:
        buffer = min(buffer, int(available_bytes * _SHARE) // max(1, len(cores)))
    if not cores or buffer < _LEAST_BUFFER:
        return None
    # The caller's environment would bring its warnings, hooks and start-up files.
    command = [sys.executable, "-I", "-S", "-c", _WORKER, str(buffer), str(seconds)]
    return _together(command, cores, seconds)


def _one_of_each_core(cpu: Cpu) -> list[int]:
    allowed = set(cpu.allowed or cpu.online or ()) & os.sched_getaffinity(0)
    cores = [frozenset(core & allowed) for core in cpu.siblings] or [
        frozenset({one}) for one in allowed
    ]
    return sorted(min(core) for core in cores if core)


def _together(command: Sequence[str], cores: Sequence[int], seconds: float) -> float | None:
    workers: list[subprocess.Popen[str]] = []
    mine = os.sched_getaffinity(0)
    until = time.monotonic() + _GRACE_S + seconds
    try:
        for core in cores:
            # A process inherits the affinity, and with it takes its memory from the core's node.
            os.sched_setaffinity(0, {core})
            workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, env={},
                )
            )  # fmt: skip
        os.sched_setaffinity(0, mine)
        if not all(_line(worker) == "ready" for worker in workers):
            return None
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        rates = []
        for worker in workers:
            out, _ = worker.communicate(timeout=max(0.1, until - time.monotonic()))
            rates.append(float(out))
        return sum(rates)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, mine)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            # Closes the pipes too.
            with contextlib.suppress(OSError, ValueError):
                worker.communicate()


def _line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()
