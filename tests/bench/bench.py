"""What stackctl costs, against yardsticks on the same machine: `make bench`.

    python3 tests/bench/bench.py [--only NAME] [--repeats N] [--no-gguf]

NAME: start, plan, header, up, switch, predict (of stackctl); client, timings (how right `stackctl
bench` measures; also against aiperf where it is on PATH), side (its plans beside others'), fetch.

Commands that are compared are run in turn, after one unmeasured run each, and shown with their
median and their whole spread. It reports; only an error makes it fail. `up` needs the lab.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "tests"), str(Path(__file__).parent)]

import measuring  # noqa: E402
from lab import trees  # noqa: E402
from lab.host import LabError, pip  # noqa: E402
from lab.lab import IMAGE, MODEL_PATH, Lab  # noqa: E402

STACKCTL = str(Path(sys.executable).with_name("stackctl"))
USER = "lab"
PROFILE, STACK = "cpu-latency", "cpu"
# What `up` asks at its end: a part of what it adds, and the engine's own time.
QUESTION = (
    '{"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 16, '
    '"temperature": 0}'
)
# Some 1,850 tokens: most of the largest micro-batch (2,048) and of the smallest context.
LONG_QUESTION = json.dumps(
    {"messages": [{"role": "user", "content": "red green blue " * 610}], "max_tokens": 2}
)
# The load at the beginning above which a measurement is not to be trusted.
QUIET = 0.5
ALL = ("start", "plan", "header", "up", "switch", "predict", "client", "timings", "side",
       "fetch")  # fmt: skip
GGUF_FOLDER = CHECKOUT / ".bench/gguf"

READ_OURS = """\
import sys, time
from pathlib import Path
from stackctl.sources.gguf import read_header
begin = time.perf_counter()
read_header(Path(sys.argv[1]))
print(time.perf_counter() - begin)
"""
READ_THEIRS = """\
import sys, time
from gguf import GGUFReader
begin = time.perf_counter()
GGUFReader(sys.argv[1])
print(time.perf_counter() - begin)
"""

Measure = Callable[[], float]


def main() -> int:
    """Run the chosen benchmarks and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=[*ALL])
    parser.add_argument("--repeats", type=int, help="instead of 21, 11, 11, 5, 5 and 5")
    parser.add_argument("--no-gguf", action="store_true", help="leave the gguf package out")
    options = parser.parse_args()
    chosen = [options.only] if options.only else [*ALL]
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, ", end="")
    busy = os.getloadavg()[0]
    print(f"load {busy:.1f}; page cache warm\n")
    print(f"{'':<40}{'MEDIAN':>9}  {'SPREAD':<15}{'RATIO':>7}  AIM", flush=True)
    try:
        if "start" in chosen:
            start(options.repeats or 21)
        if "plan" in chosen:
            plan(options.repeats or 11)
        if "header" in chosen:
            header(options.repeats or 11, theirs=not options.no_gguf)
        if "up" in chosen:
            up(options.repeats or 5)
        if "switch" in chosen:
            switch(options.repeats or 5)
        if "predict" in chosen:
            predict()
        if "client" in chosen:
            measuring.client()
        if "timings" in chosen:
            measuring.timings(options.repeats or 5)
        if "side" in chosen:
            measuring.side(options.repeats or 7)
        if "fetch" in chosen:
            fetch(options.repeats or 5)
    except (LabError, subprocess.CalledProcessError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        said = getattr(error, "stderr", "") or ""
        print(said.strip()[-2000:], file=sys.stderr)
        return 1
    if busy > QUIET:
        print(f"\nthe machine was busy (load {busy:.1f}): take these figures as upper bounds")
    words = [Path(sys.executable).name, *sys.argv]
    print(f"\nagain: {' '.join(words)}")
    return 0


def start(repeats: int) -> None:
    """Starting up: what every command costs at least."""
    compare(
        repeats,
        {
            "python -c pass": lambda: run([sys.executable, "-c", "pass"]),
            "stackctl --version": lambda: run([STACKCTL, "--version"]),
        },
        aims={"stackctl --version": 0.086},
    )


def plan(repeats: int) -> None:
    """Planning for recorded facts, the model's header read on the way."""
    model = f"file:{trees.fetch_model()}"
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder) / "facts.json"
        probed = subprocess.run(
            [STACKCTL, "probe", "--json"], capture_output=True, text=True, check=True
        )
        facts.write_text(probed.stdout)
        words = [STACKCTL, "plan", PROFILE, "--facts", str(facts), "--model", model]
        compare(
            repeats,
            {
                "stackctl --version": lambda: run([STACKCTL, "--version"]),
                f"stackctl plan {PROFILE} --facts": lambda: run(words),
            },
            aims={f"stackctl plan {PROFILE} --facts": 0.3},
        )


def header(repeats: int, *, theirs: bool) -> None:
    """Reading the header of a model with a vocabulary of 262,144 words, without start-up."""
    model = str(trees.fetch_model())
    ours = [timed_inside(READ_OURS, model) for _ in range(repeats + 1)][1:]
    yardstick = None
    if theirs:
        # One run is enough to tell seconds from milliseconds.
        once = [timed_inside(READ_THEIRS, model, {"PYTHONPATH": str(gguf_package())})]
        yardstick = statistics.median(once)
        row("GGUF header, the gguf package", once, None, None)
        agree = [sys.executable, str(Path(__file__).with_name("agree.py")), model]
        told = {**environment(), "PYTHONPATH": str(gguf_package())}
        said = subprocess.run(agree, env=told, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        print(f"the two readings: {said.stdout.decode().strip()}", file=sys.stderr)
        said.check_returncode()
    row("GGUF header, stackctl", ours, yardstick, 0.05)


def up(repeats: int) -> None:
    """`up` against the start of the same unit by systemd alone, both until it is healthy."""
    arguments = [PROFILE, "--model", f"file:{MODEL_PATH}"]
    unit = f"{STACK}.service"
    url = "http://127.0.0.1:8080/v1/chat/completions"
    with Lab() as lab:

        def inside(*words: str) -> float:
            begin = time.perf_counter()
            lab.run(words, user=USER, timeout=180, check=True)
            return time.perf_counter() - begin

        first = inside("stackctl", "up", *arguments)
        inside("stackctl", "down", STACK)
        alone: list[float] = []
        whole: list[float] = []
        asked: list[float] = []
        for _ in range(repeats):
            whole.append(inside("stackctl", "up", *arguments))
            inside("systemctl", "--user", "stop", unit)
            # The unit is ready when its health check is (Notify=healthy).
            alone.append(inside("systemctl", "--user", "start", unit))
            asked.append(inside("curl", "--fail", "--silent", "--data", QUESTION, url))
            inside("stackctl", "down", STACK)
    row(f"systemctl --user start {unit}", alone, None, None)
    row(f"stackctl up {PROFILE}", whole, statistics.median(alone), None)
    added = [one - other for one, other in zip(whole, alone, strict=True)]
    row("  added by up", added, None, 1.5)
    row("  of which asking for 16 tokens", asked, None, None)
    row("  first up with an image (reads its help)", [first], statistics.median(alone), None)


def switch(repeats: int) -> None:
    """What clients wait in a switch, against the new engine's own start by systemd alone.

    Stop first: a prompt cache of over half the memory keeps two engines from running at once.
    """
    client = Path(__file__).parents[1] / "lab/client.py"
    with Lab() as lab:
        Path(f"/proc/{lab.pid}/root/srv/client.py").write_bytes(client.read_bytes())
        total = json.loads(lab.run(["stackctl", "probe", "--json"]).stdout)["memory"]["total_bytes"]
        large = ["--set", f"engine_args.cache-ram={int(total * 0.6) // 2**20}"]

        def inside(*words: str) -> tuple[float, str]:
            begin = time.perf_counter()
            done = lab.run(words, user=USER, timeout=180, check=True)
            return time.perf_counter() - begin, done.stderr

        inside("stackctl", "up", PROFILE, "--model", f"file:{MODEL_PATH}", *large)
        gaps: list[float] = []
        alone: list[float] = []
        failed = answered = 0
        for number in range(repeats):
            words = ["python3", "/srv/client.py", "http://127.0.0.1:8080", "12", "1"]
            with lab.spawn(words, user=USER) as load:
                assert load.stdout is not None
                load.stdout.readline()
                to = ("throughput", "latency")[number % 2]
                _, said = inside("stackctl", "switch", to, "--yes", "--soak", "0s")
                found = json.loads(load.communicate(timeout=120)[0].splitlines()[-1])
            gaps.append(float(re.findall(r"the longest ([0-9.]+) s", said)[0]))
            failed, answered = failed + found["failed"], answered + found["answered"]
            shown = json.loads(lab.run(["stackctl", "status", "--json"], user=USER).stdout)
            unit = shown["stacks"][0]["unit"]
            inside("systemctl", "--user", "stop", unit)
            alone.append(inside("systemctl", "--user", "start", unit)[0])
    row("the engine's own start (systemctl)", alone, None, None)
    row("longest wait in a switch, stop first", gaps, statistics.median(alone), None)
    print(f"requests meanwhile: {answered} answered, {failed} failed")


def predict() -> None:
    """What plans predict against what the engine takes and does, in the lab."""
    with Lab() as lab:

        def stackctl(*words: str) -> Any:
            done = lab.run(["stackctl", *words, "--json"], timeout=600, check=True)
            return json.loads(done.stdout)

        print(f"\n{'':<40}{'PREDICTED':>12}{'REAL':>12}{'RATIO':>8}  AIM", flush=True)
        for objective in ("latency", "throughput"):
            for kv_type in ("f16", "q8_0"):
                for context in (2048, 8192, 32768):
                    words = ["--objective", objective, "--set", f"kv_type={kv_type}"]
                    _memory(lab, stackctl, [*words, "--set", f"context={context}"])
        lab.run(["stackctl", "down"], check=True)
        model = f"file:{MODEL_PATH}"
        stackctl("calibrate", "cpu", "--model", model)
        lab.run(["mkdir", "-p", "/srv/q8"], check=True)
        quantize = ["podman", "run", "--rm", "--network=none", "--entrypoint=llama-quantize"]
        quantize += [f"--volume={MODEL_PATH}:/in.gguf:ro", "--volume=/srv/q8:/out", IMAGE]
        quantize += ["--allow-requantize", "/in.gguf", "/out/q8.gguf", "Q8_0"]
        lab.run(quantize, timeout=300, check=True)
        other = "file:/srv/q8/q8.gguf"
        # On a busy machine too slow for the objective, which is not what is measured here.
        words = ["plan", "cpu", "--model", other, "--set", "slo.ttft_s=6000"]
        predicted = stackctl(*words)["prediction"]["decode_tok_s"]
        middle = sum(predicted) / 2
        real = stackctl("calibrate", "cpu", "--model", other)["decode_tok_s"]
        name = "decode tok/s, Q8_0 from Q4_K_M"
        print(f"{name:<40}{middle:>12.1f}{real:>12.1f}{middle / real:>8.2f}  0.75-1.25")


def fetch(repeats: int) -> None:
    """A download of 1 GB on loopback, against curl, tee and sha256sum; and what memory it takes."""
    fetched = str(Path(__file__).with_name("fetch.py"))
    with tempfile.TemporaryDirectory(dir=_made(CHECKOUT / ".bench")) as folder:
        source = Path(folder, "source")
        source.mkdir()
        with (source / "m.gguf").open("wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 24))
        words = [sys.executable, str(CHECKOUT / "tests/hub.py"), f"a/b={source}", "--port", "0"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as hub:
            try:
                assert hub.stdout is not None
                site = hub.stdout.readline().strip().partition("=")[2]
                url, target = f"{site}/a/b/resolve/main/m.gguf", Path(folder, "target")
                rss: list[int] = []

                def ours() -> float:
                    done = subprocess.run(
                        [sys.executable, fetched, site, str(target)],
                        env=environment(), capture_output=True, text=True, check=True,
                    )  # fmt: skip
                    target.unlink()
                    seconds, peak = done.stdout.split()
                    rss.append(int(peak))
                    return float(seconds)

                def theirs(command: str) -> float:
                    begin = time.perf_counter()
                    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"],
                                   stdout=subprocess.DEVNULL, check=True)  # fmt: skip
                    took = time.perf_counter() - begin
                    target.unlink()
                    return took

                pipe = f"curl --silent --fail --location {url} | tee {target} | sha256sum"
                pipe_s, _, ours_s = compare(
                    repeats,
                    {
                        "curl | tee FILE | sha256sum": lambda: theirs(pipe),
                        "the same, and sync FILE": lambda: theirs(f"{pipe}; sync {target}"),
                        "stackctl's download (it syncs)": ours,
                    },
                    aims={},
                )
                speed = pipe_s / ours_s
                print(f"{'its speed':<40}{speed:>8.2f}x  {'':<24}>= 0.9x: "
                      f"{'met' if speed >= 0.9 else 'MISSED'}")  # fmt: skip
                most = max(rss) / 1024
                print(f"{'its memory':<40}{most:>7.0f} MB  {'':<24}< 200 MB: "
                      f"{'met' if most < 200 else 'MISSED'}")  # fmt: skip
            finally:
                hub.terminate()


def _memory(lab: Lab, stackctl: Callable[..., Any], words: Sequence[str]) -> None:
    """Resident size after a prompt that fills a micro-batch, whose buffers are else not touched;
    without the prompt cache, which fills up later."""
    stackctl("up", "cpu", "--model", f"file:{MODEL_PATH}", "--yes", *words)
    url = "http://127.0.0.1:8080/v1/chat/completions"
    lab.write("/root/ask.json", LONG_QUESTION)
    lab.run(
        ["curl", "--fail", "--silent", "--data", "@/root/ask.json", url], timeout=240, check=True
    )
    pid = lab.run(["pgrep", "-x", "llama-server"], check=True).stdout.strip()
    status = lab.read(f"/proc/{pid}/status")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    real = int(line.split()[1]) * 1024
    plan = stackctl("plan", "cpu", "--model", f"file:{MODEL_PATH}", *words)
    cache = next(d["value"] for d in plan["decisions"] if d["field"] == "cache-ram")
    predicted = plan["memory"]["total_bytes"] - cache * 2**20
    name = "MiB, " + " ".join(word for word in words if not word.startswith("--"))
    mib = 2**20
    print(
        f"{name:<40}{predicted / mib:>12.0f}{real / mib:>12.0f}{predicted / real:>8.2f}  0.90-1.10",
        flush=True,
    )


def compare(
    repeats: int, measures: Mapping[str, Measure], *, aims: Mapping[str, float]
) -> list[float]:
    """Measure in turn, so that what disturbs the machine disturbs all of them; the first is 1.

    Returns the medians.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        measure()
    for _ in range(repeats):
        for name, measure in measures.items():
            found[name].append(measure())
    yardstick: float | None = None
    for name, times in found.items():
        row(name, times, yardstick, aims.get(name))
        yardstick = yardstick or statistics.median(times)
    return [statistics.median(times) for times in found.values()]


def row(name: str, times: Sequence[float], yardstick: float | None, aim: float | None) -> None:
    """One line of the table."""
    median = statistics.median(times)
    spread = f"{min(times):.3f}-{max(times):.3f}" if len(times) > 1 else "one run"
    if yardstick is None:
        ratio = ""
    else:
        times_as_long = median / yardstick
        ratio = f"{times_as_long:.1f}x" if times_as_long >= 0.1 else f"1/{1 / times_as_long:.0f}"
    verdict = "" if aim is None else f"< {aim:g} s: {'met' if median < aim else 'MISSED'}"
    print(f"{name:<40}{median:>7.3f} s  {spread:<15}{ratio:>7}  {verdict}".rstrip(), flush=True)


def run(words: Sequence[str]) -> float:
    """How long a command takes, with compiled modules kept, as an installed program has them."""
    begin = time.perf_counter()
    subprocess.run(
        words, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    return time.perf_counter() - begin


def timed_inside(code: str, argument: str, extra: Mapping[str, str] | None = None) -> float:
    """What a fresh Python says that the interesting part of CODE took."""
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        env={**environment(), **(extra or {})},
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def environment() -> dict[str, str]:
    """Our environment without what slows Python down."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONUNBUFFERED")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def gguf_package() -> Path:
    """The gguf package, fetched when it is first needed: no part of the project's environment."""
    if not GGUF_FOLDER.exists():
        print("fetching the gguf package to compare with", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=_made(GGUF_FOLDER.parent)) as folder:
            options = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
            words = [*pip(), "install", *options, "--target", f"{folder}/gguf", "gguf"]
            subprocess.run(words, capture_output=True, text=True, check=True)
            Path(folder, "gguf").replace(GGUF_FOLDER)
    return GGUF_FOLDER


def cpu_name() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
