"""How right `stackctl bench` measures, and what plans are worth: parts of `make bench`."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.lab import IMAGE, MODEL_PATH, Lab

from stackctl.machine.streaming_client import StreamingClient
from stackctl.observe.bench.statistics import quantile, ratio

HERE = Path(__file__).parent
STREAMS, FIRST_S, GAP_S, PIECES = 64, 0.1, 0.02, 200
#: What RamaLama 0.25 starts on a machine of up to four processors (`ramalama --dryrun serve`).
RAMALAMA = ("--no-warmup", "--temp", "0.8", "--threads", "4")
ONE_THREAD = ("--set", "engine_args.threads=1", "--set", "engine_args.threads-batch=1")
OTHERS = {"llama-server's defaults": (9101, ()), "RamaLama's choice": (9102, RAMALAMA)}
_SENT = re.compile(rb'"content": "([0-9.]+)"')


def client() -> None:
    """The client's error with 64 streams: its moment of a piece, less that of its sending."""
    errors: list[float] = []
    with known_delays() as url, StreamingClient(url) as streams:
        time.sleep(0.2)
        for number in range(STREAMS):
            assert streams.post("/v1/chat/completions", b"{}", number) is None
        done = []
        while len(streams):
            done += list(streams.poll(1))
        lags, share = streams.lags, streams.cpu_share
    for exchange in done:
        for moment, data in exchange.pieces:
            errors += [moment - float(sent) for sent in _SENT.findall(data)]
    print(f"\n{'client, 64 streams, ' + str(len(errors)) + ' pieces':<40}{'P50':>9}{'P95':>9}"
          f"{'P99':>9}{'MOST':>9}  AIM")  # fmt: skip
    for name, values, aim in (("moment, later than sent (ms)", errors, 2.0),
                              ("read, later than it came (ms)", lags, None)):  # fmt: skip
        marks = [1000 * quantile(values, share) for share in (0.5, 0.95, 0.99, 1.0)]
        verdict = "" if aim is None else f"< {aim:g}: {'met' if marks[2] < aim else 'MISSED'}"
        print(f"{name:<40}" + "".join(f"{mark:>9.3f}" for mark in marks) + f"  {verdict}")
    print(f"{'processor of the client':<40}{100 * share:>8.0f}%", flush=True)


@contextmanager
def known_delays() -> Iterator[str]:
    """A server that answers after FIRST_S, a piece every GAP_S: its URL."""
    words = [sys.executable, str(HERE / "delays.py"), str(FIRST_S), str(GAP_S), str(PIECES)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


def timings(rounds: int) -> None:
    """Our tok/s against llama-server's own of the same requests, and aiperf's where it is here.

    The engine has a processor of its own: a client that takes time from it measures another engine.
    """
    aiperf = shutil.which("aiperf")
    first, *others = sorted(os.sched_getaffinity(0))
    assert others, "engine and client need a processor each"
    with Lab() as lab:
        url, served, _ = _up(lab, "latency", *ONE_THREAD)
        (pid,) = lab.run(["pgrep", "-x", "llama-server"], check=True).stdout.split()
        lab.run(["taskset", "--all-tasks", "--pid", "--cpu-list", str(first), pid], check=True)
        spec = {"targets": {"stackctl": [url, served]}, "rounds": rounds, "concurrency": 1,
                "prompt": 256, "output": 128, "aiperf": aiperf,
                "requests": 5 if aiperf else 1}  # fmt: skip
        found = _ask(lab, spec, cpus=others)
    ours = found["stackctl"]
    print(f"\n{'tok/s, the same requests':<40}{'STACKCTL':>9}{'THEIRS':>9}{'RATIO':>8}  AIM")
    pairs = [(a / b) for a, b in zip(ours["tok_s"], ours["engine_tok_s"], strict=True)]
    _agreement("llama-server's timings", ours["tok_s"], ours["engine_tok_s"], pairs, 0.03)
    if aiperf is None:
        print("aiperf: not on PATH, left out")
        return
    _aiperf("", found)
    # No engine is quite the same from one round to the next; this server is.
    with known_delays() as url:
        spec |= {"targets": {"stackctl": [url, "m"]}, "output": PIECES, "rounds": min(rounds, 2)}
        _aiperf(" of known delays", json.loads(_asking([], spec)))


def _aiperf(name: str, found: Mapping[str, Any]) -> None:
    ours, theirs = found["stackctl"], found["stackctl by aiperf"]
    for unit, key in (("tok/s", "tok_s"), ("first token s", "ttft_s")):
        share = f"{key} share"
        middle = statistics.median(ours[key]) / statistics.median(theirs[key])
        # Each client has requests of its own, and no engine takes the same for all.
        aim = None if share in ours else 0.05
        _agreement(f"aiperf{name}, {unit}", ours[key], theirs[key], [middle], aim)
        if share in ours:
            middle = statistics.median(ours[share]) / statistics.median(theirs[share])
            _agreement("  by the engine's own clock", ours[share], theirs[share], [middle], 0.05)


def side(rounds: int) -> None:
    """stackctl's plan, llama-server's defaults and RamaLama's choice, in turn on one machine."""
    print(f"\n{'Gemma 3 270M, 512 in, 64 out':<34}{'TOK/S':>8}{'ALL':>8}{'FIRST s':>9}"
          "  STACKCTL'S TOK/S, 95 % INTERVAL")  # fmt: skip
    with Lab() as lab:
        for name, (port, options) in OTHERS.items():
            _serve(lab, name, port, options)
        for objective, at_once in (("latency", 1), ("throughput", 4)):
            url, served, slots = _up(lab, objective)
            targets = {f"stackctl ({objective}, {slots})": [url, served]}
            targets |= {name: [f"http://127.0.0.1:{port}", "m"] for name, (port, _) in
                        OTHERS.items()}  # fmt: skip
            spec = {"targets": targets, "rounds": rounds, "concurrency": at_once, "prompt": 512,
                    "output": 64}  # fmt: skip
            found = _ask(lab, spec)
            _table(f"{objective}, {at_once} at once", found)


def _table(title: str, found: Mapping[str, Any]) -> None:
    print(title)
    key = "all"
    ours: Sequence[float] = []
    for name, figures in found.items():
        speeds = [value for value in figures["tok_s"] if value]
        row = [statistics.median(values) for values in (speeds, figures["all"], figures["ttft_s"])]
        told = ""
        if ours:
            factor = ratio(figures[key], ours)
            middle = statistics.median(ours) / row[1]
            told = f"{middle:.2f} x" if factor is None else (
                f"{factor[0]:.2f} x ({factor[1]:.2f} to {factor[2]:.2f})")  # fmt: skip
        else:
            ours = figures[key]
        print(f"  {name:<32}{row[0]:>8.1f}{row[1]:>8.1f}{row[2]:>9.2f}  {told}", flush=True)


def _agreement(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    pairs: Sequence[float],
    aim: float | None,
) -> None:
    middle = statistics.median(pairs)
    told = "  the engine's own difference is in it"
    if aim is not None:
        verdict = "met" if abs(middle - 1) <= aim else "MISSED"
        told = f"  within {100 * aim:.0f} %: {verdict}"
    print(
        f"{name:<40}{statistics.median(ours):>9.3g}{statistics.median(theirs):>9.3g}{middle:>8.3f}"
        f"{told}", flush=True,
    )  # fmt: skip


def _up(lab: Lab, objective: str, *more: str) -> tuple[str, str, int]:
    """Start stackctl's own: where it listens (the engine itself), its model, its slots."""
    words = ["stackctl", "up", "cpu", "--objective", objective, "--model", f"file:{MODEL_PATH}",
             "--yes", "--soak", "0s", "--set", "slo.ttft_s=6000", *more]  # fmt: skip
    lab.run(words, timeout=300, check=True)
    told = json.loads(lab.run(["stackctl", "status", "--json"], timeout=120, check=True).stdout)
    number = told["stacks"][0]["generation"]
    plan = json.loads(lab.read(f"/var/lib/stackctl/stacks/cpu/{number}.json"))["plan"]
    slots = next(d["value"] for d in plan["decisions"] if d["field"] == "parallel")
    return f"http://127.0.0.1:{plan['engine_port'] or plan['port']}", plan["served_name"], slots


def _serve(lab: Lab, name: str, port: int, options: Sequence[str]) -> None:
    """The same engine and model, started by hand."""
    lab.run(
        ["podman", "run", "--detach", "--rm", "--network=host", f"--volume={MODEL_PATH}:/m.gguf:ro",
         IMAGE, "llama-server", "--model", "/m.gguf", "--host", "127.0.0.1", "--port", str(port),
         "--alias", "m", *options], timeout=60, check=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while lab.run(["curl", "-sf", f"http://127.0.0.1:{port}/health"]).returncode != 0:
        assert time.monotonic() < deadline, f"{name} does not start"
        time.sleep(0.5)


def _ask(lab: Lab, spec: Mapping[str, Any], *, cpus: Sequence[int] = ()) -> Any:
    """Run asking.py here, in the lab's network, on those processors (or all).

    All engines go before other work on this machine, alike: their threads wait for each other, and
    one that gets no processor makes a minute of a second.
    """
    for pid in lab.run(["pgrep", "-x", "llama-server"]).stdout.split():
        lab.run(["sh", "-c", f"echo -20 >/proc/{pid}/autogroup"])
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cpus))] if cpus else []
    return json.loads(_asking(["nsenter", "--target", str(lab.pid), "--net", *pinned], spec))


def _asking(words: Sequence[str], spec: Mapping[str, Any]) -> str:
    done = subprocess.run(
        [*words, sys.executable, str(HERE / "asking.py")], input=json.dumps(spec), text=True,
        stdout=subprocess.PIPE, timeout=1800, check=True,
    )  # fmt: skip
    return done.stdout
