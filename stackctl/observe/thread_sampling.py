"""Samples of an engine's threads, and of other users of its CPUs, while it answers requests."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stackctl.health import endpoint
from stackctl.health.completion_check import PROMPT
from stackctl.machine import http
from stackctl.machine.machine import Machine
from stackctl.observe import procfs
from stackctl.values.cpu_list import CpuList
from stackctl.values.inspection import EngineThread, Neighbour
from stackctl.values.plan import Plan

#: The shortest time of sampling, and the longest time of an answer, in seconds.
_WATCH_S, _ANSWER_S = 0.5, 20.0
#: Completions that keep the engine busy: tokens of each, and the most requests.
_TOKENS, _MOST_REQUESTS = 32, 8
#: A model of fewer parameters computes so little that the HTTP threads would seem to compute too,
#: so its completions are longer.
_TOY_PARAMETERS, _TOY_TOKENS = 50_000_000, 256
#: A process that wants less than this share of one CPU is not reported.
_BUSY = 0.2


@dataclass(frozen=True)
class ThreadSample:
    """The result of a sampling: ``did`` describes the engine's work, ``seconds`` its duration."""

    threads: tuple[EngineThread, ...]
    neighbours: tuple[Neighbour, ...]
    did: str
    seconds: float


def sample_threads(
    machine: Machine, plan: Plan, engine_pids: tuple[int, ...], own: frozenset[int]
) -> ThreadSample:
    """Sample threads and neighbours for half a second or more.

    ``own`` are the processes of the stack, which are not neighbours. The requests go to the
    engine's own port, which needs no key.
    """
    was, began = _all_times(machine), time.monotonic()
    did = _keep_busy(plan, began)
    now = procfs.thread_times(machine, engine_pids)
    # A process that computes only now and then is no neighbour. A short sample would count it.
    time.sleep(max(0.0, _WATCH_S - (time.monotonic() - began)))
    after, seconds = _all_times(machine), time.monotonic() - began
    return ThreadSample(
        threads=tuple(
            thread
            for pid in engine_pids
            for thread in thread_activity(was, now, pid, procfs.affinities(machine, pid))
        ),
        neighbours=tuple(_neighbours(machine, plan, was, after, own | {os.getpid()}, seconds)),
        did=did,
        seconds=round(seconds, 2),
    )


def _all_times(machine: Machine) -> procfs.TimesByThread:
    pids = (int(path.rpartition("/")[2]) for path in machine.glob("/proc/[0-9]*"))
    return procfs.thread_times(machine, pids)


def _keep_busy(plan: Plan, began: float) -> str:
    """Send requests to the engine during the sampling; return a description of its work.

    The requests are plain completions, because a chat template gives work to other threads.
    """
    url, tokens = endpoint.base_url(plan.engine_listen_port) + "/v1/completions", 0
    each = _TOKENS if plan.model.parameters >= _TOY_PARAMETERS else _TOY_TOKENS
    body = {"model": plan.served_name, "prompt": PROMPT, "max_tokens": each}
    for _ in range(_MOST_REQUESTS):
        answer = http.post(url, body | {"temperature": 0, "ignore_eos": True}, timeout_s=_ANSWER_S)
        if isinstance(answer, http.NoAnswer):
            return f"while it did not answer: {answer.reason}"
        if answer.status != 200:
            return f"while it answered HTTP {answer.status}"
        tokens += each
        if time.monotonic() - began >= _WATCH_S:
            break
    return f"over {tokens} tokens"


def thread_activity(
    was: procfs.TimesByThread, now: procfs.TimesByThread, pid: int, cpus: Mapping[int, CpuList]
) -> Iterator[EngineThread]:
    """Yield the threads of a process, with their times between two samples."""
    for tid, allowed in cpus.items():
        last = now.get((pid, tid))
        span = last.since(was.get((pid, tid))) if last else None
        yield EngineThread(
            process=pid,
            id=tid,
            cpus=allowed,
            computed_ns=span.computed_ns if span else None,
            waited_ns=span.waited_ns if span else None,
        )


def _neighbours(
    machine: Machine,
    plan: Plan,
    before: procfs.TimesByThread,
    after: procfs.TimesByThread,
    own: frozenset[int],
    seconds: float,
) -> Iterator[Neighbour]:
    """Yield other busy processes that may use CPUs of the plan, the busiest first."""
    planned = set(plan.placement.cpus or ())
    online = set(CpuList.parse(machine.read("/sys/devices/system/cpu/online") or ""))
    spans = defaultdict(list)
    for (pid, tid), last in after.items():
        spans[pid].append(last.since(before.get((pid, tid))))
    shares = []
    for pid in {pid for pid, _ in before} & spans.keys() - own:
        ran = sum(span.computed_ns for span in spans[pid]) / 1e9 / seconds
        wanted = ran + sum(span.waited_ns for span in spans[pid]) / 1e9 / seconds
        if wanted >= _BUSY:
            shares.append((wanted, ran, pid))
    for wanted, ran, pid in sorted(shares, reverse=True):
        lists = procfs.affinities(machine, pid).values()
        cpus = {cpu for one in lists for cpu in one}
        stat = procfs.read_stat(machine, pid)
        if stat is None or not cpus & planned:
            continue
        yield Neighbour(
            pid=pid,
            command=stat.command,
            share=round(ran, 2),
            wanted=round(wanted, 2),
            cpus=CpuList(cpus),
            pinned=cpus <= planned and cpus < online,
        )
