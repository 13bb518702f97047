"""Measurement of the memory bandwidth with the standard library alone."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence

from stackctl.values.host import Cpu

#: Bytes for each core: far above its share of the largest caches (32 MiB), so that nearly all
#: reads reach the memory.
_BUFFER = 256 * 2**20
#: All buffers together take at most this part of the available memory.
_SHARE = 0.25
_LEAST_BUFFER = 64 * 2**20
#: With many cores, the start of the processes and the first access to each page take a while.
_GRACE_S = 20.0

#: The program of each process: fill a buffer, report that, wait for the start, then search the
#: buffer until the end. The byte is absent, so bytes.find reads everything with memchr, which uses
#: the widest registers of the processor and writes nothing.
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
    """Return the bytes per second that all physical cores together read from memory.

    One process is bound to each physical core that this process may use. All read buffers of their
    own in order, again and again, in the same second, and the rates are added. This measures
    sequential reading from memory of the core's own NUMA node, which is the best case of reading
    weights. It does not measure random access, writing, or the memory of another node.

    Limits: other load lowers the result. If few cores share many channels, the read rate of a core
    bounds it, as it bounds an engine. If the caches were larger than all buffers together, it would
    be too high, so the buffers exceed the known L3 caches. A cgroup's CPU quota lowers it, as it
    lowers the speed of an engine.

    Args:
        cpu: the machine's processors; each core's first allowed CPU is used.
        available_bytes: the free memory, of which at most a quarter is used.
        seconds: the time of reading, after the buffers are filled.

    Returns:
        None if there is too little memory, or a process cannot be started, fails, or does not end
        in time.
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
    # -I -S and an empty environment keep out warnings, hooks and start-up files of the caller.
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
            # A process inherits the affinity, so its memory comes from the core's node.
            os.sched_setaffinity(0, {core})
            workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, env={},
                )
            )  # fmt: skip
        os.sched_setaffinity(0, mine)
        if not all(_reports_ready(worker, until) for worker in workers):
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
            # communicate() also closes the pipes.
            with contextlib.suppress(OSError, ValueError):
                worker.communicate()


def _reports_ready(worker: subprocess.Popen[str], until: float) -> bool:
    """Return True if a process has filled its buffer before ``until`` (monotonic seconds)."""
    assert worker.stdout is not None
    left_s = max(0.0, until - time.monotonic())
    # A process writes its line at once, so that readline does not wait for the rest of it.
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    return bool(poll.poll(left_s * 1000)) and worker.stdout.readline().strip() == "ready"
