"""``verify`` on stacks that run as planned, and on stacks that were changed afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from . import look
from .conftest import EITHER_USER, Seat
from .lab import IMAGE, Lab
from .tinymodel import tiny_model

#: On a busy machine threads wait for CPUs. That is a correct finding and no fault of the stack.
NOISE = {"cores", "threads"}
LISTEN = """
import socket, sys, time
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen()
print("listening", flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module", params=EITHER_USER)
def served(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Seat]:
    """Yield a user whose stack is up with a small model of its own. Each test restores it."""
    seat = Seat(lab, str(request.param))
    look.put(lab, model(seat), tiny_model())
    try:
        seat.stackctl(*up(seat))
        yield seat
    finally:
        seat.reset()


def model(seat: Seat) -> str:
    """Return the path of the user's model."""
    return f"/srv/models/verify-{seat.user}.gguf"


def up(seat: Seat) -> tuple[str, ...]:
    """Return the arguments that start the user's stack."""
    return ("up", "cpu-latency", "--model", f"file:{model(seat)}")


def verify(seat: Seat, stack: str = "cpu", *, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the results by name, in their order."""
    found = json.loads(seat.stackctl("verify", stack, "--json", code=code).stdout)
    assert found["schema"] == "stackctl.verify/1"
    return {result["name"]: result for result in found["results"]}


def failed(results: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of the failed results."""
    # Failures come first, and each has a remedy.
    ranks = [{"fail": 0, "warn": 1}.get(one["status"], 2) for one in results.values()]
    assert ranks == sorted(ranks)
    wrong = [one for one in results.values() if one["status"] == "fail"]
    assert all(one["remedy"] and one["actual"] for one in wrong), wrong
    return {one["name"] for one in wrong}


def test_an_honest_plan(served: Seat) -> None:
    results = verify(served)
    wrong = {name for name, one in results.items() if one["status"] in ("fail", "warn", "skip")}
    assert wrong <= NOISE, {name: results[name] for name in wrong}
    plan = look.record(served, 1)["plan"]
    assert results["argv"]["actual"] == f"as planned ({len(plan['argv']) - 1} arguments)"
    assert results["cpus"]["actual"] == f"{plan['placement']['cpus']}, every thread"
    assert re.fullmatch(r"node 0 holds 100 % of [\d.]+ MiB", results["memory"]["actual"])
    assert results["ports"]["actual"] == f"127.0.0.1:{plan['engine_port']} and 127.0.0.1:8080"
    assert results["context"]["actual"] == "2048"
    assert results["model-path"]["actual"] == f"/models/verify-{served.user}.gguf"
    assert results["door"]["actual"] == (
        f"open, leads to generation 1 (port {plan['engine_port']})"
    )
    assert results["files"]["actual"] == "1 file, 1.4 MiB, unchanged"


def test_a_small_model_is_locked_and_no_cpuset_is_claimed(served: Seat) -> None:
    results = verify(served)
    pid = look.engine_pid(served)
    locked = look.process_status(served.lab, pid)["VmLck"]
    assert results["locked"]["status"] == "ok", results["locked"]
    assert locked == "1428 kB"
    group = served.lab.read(f"/proc/{pid}/cgroup").partition("0::")[2].splitlines()[0]
    controllers = served.lab.read(f"/sys/fs/cgroup{group}/cgroup.controllers").split()
    if "cpuset" in controllers:
        pytest.skip("this machine has a cpuset controller")
    assert results["cpuset"]["status"] == "info"
    assert "no such controller" in results["cpuset"]["actual"]
    # A profile that wants a cpuset is refused before anything starts.
    done = served.stackctl(*up(served), "--name", "bound", "--set", "placement.cpus=0", code=6)
    look.assert_error(done, "cannot use the cpuset controller")


def test_for_people(served: Seat) -> None:
    lines = served.stackctl("verify", "cpu").stdout.splitlines()
    assert all(len(line) <= 80 or line.lstrip().startswith("fix: ") for line in lines), lines
    assert "ok    argv         as planned" in "\n".join(lines)


def test_a_neighbour_on_the_same_core(served: Seat) -> None:
    spin = ["taskset", "-c", "0", "python3", "-c", "while True: pass"]
    with served.lab.spawn(spin, user="nolinger") as busy:
        try:
            time.sleep(0.2)
            results = verify(served, code=1)
        finally:
            busy.kill()
    assert failed(results) == {"cores"}
    found = results["cores"]
    assert re.fullmatch(r"python3 \(process \d+\) is pinned to CPU 0", found["actual"])
    assert re.search(r"wants \d+ % of it and got \d+ %; its threads waited", found["evidence"])


def test_another_process_shares_the_port(served: Seat) -> None:
    with _listener(served, look.PORT) as other:
        results = verify(served, code=1)
        other.kill()
    assert failed(results) == {"ports"}
    assert re.search(r"^127\.0\.0\.1:8080 is also python3 \(process \d+\)'s", _actual(results))


def test_another_process_has_taken_the_port(served: Seat) -> None:
    served.systemctl("stop", "cpu_door.service")
    with _listener(served, look.PORT) as other:
        results = verify(served, code=1)
        other.kill()
    served.systemctl("start", "cpu_door.service")
    assert failed(results) == {"ports"}
    assert re.search(r"^127\.0\.0\.1:8080 is python3 \(process \d+\)'s", _actual(results))
    # The door does not run, so its target is unknown and not counted as correct.
    assert results["door"]["status"] == "skip"


def _actual(results: dict[str, dict[str, Any]]) -> str:
    return str(results["ports"]["actual"])


def _listener(seat: Seat, port: int) -> subprocess.Popen[str]:
    process = seat.lab.spawn(["python3", "-c", LISTEN, str(port)], user=seat.user)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_unit_edited_by_hand(served: Seat) -> None:
    unit = look.engine_unit(served)
    path = f"{served.units}/cpu/{unit.replace('.service', '.container')}"
    more = r"\nEnvironment=LLAMA_ARG_TOP_K=1 HF_TOKEN=hidden"
    change = r"s/ --threads [0-9]* / --threads 4 /; s/^\[Container\]/&" + more + "/"
    served.run("sed", "-i", change, path)
    served.systemctl("daemon-reload")
    served.systemctl("restart", unit)
    results = verify(served, code=1)
    assert failed(results) >= {"unit", "argv", "environment", "threads"}
    assert failed(results) <= {"unit", "argv", "environment", "threads", "cores"}
    assert f"{path} was changed by hand" in results["unit"]["evidence"]
    planned = look.record(served, 1)["plan"]["argv"]
    threads = planned[planned.index("--threads") + 1]
    assert results["argv"]["actual"] == f"--threads 4 instead of {threads}"
    assert results["threads"]["actual"].startswith("4 of ")
    assert "it was started with --threads 4" in results["threads"]["evidence"]
    told = f"{results['environment']['actual']}; {results['environment']['evidence']}"
    for name in ("LLAMA_ARG_TOP_K", "HF_TOKEN"):
        assert f"{name} is not planned, and engines read it" in told
    # The value of an unplanned variable may be a secret.
    assert "hidden" not in json.dumps(results)
    # The remedy works.
    remedy = results["argv"]["remedy"]
    assert remedy == f"stackctl {' '.join(up(served))}"
    served.stackctl(*remedy.split()[1:], "--yes", "--soak", "0s")
    assert failed(verify(served)) == set()


def test_a_model_that_is_replaced_after_the_start(served: Seat) -> None:
    path = model(served)
    served.lab.run(["cp", "-p", path, f"{path}.kept"], check=True)
    served.lab.run(["sh", "-c", f"cat {path} >{path}.new && mv {path}.new {path}"], check=True)
    results = verify(served, code=1)
    assert failed(results) == {"files"}
    assert results["files"]["actual"] == f"verify-{served.user}.gguf was replaced"
    assert results["files"]["remedy"].startswith("stackctl restart cpu")
    served.stackctl("restart", "cpu")
    assert failed(verify(served)) == set()
    served.lab.run(["sh", "-c", f"printf x | dd of={path} bs=1 seek=60 conv=notrunc"], check=True)
    results = verify(served, code=1)
    assert failed(results) == {"files"}
    assert "was written to since the start" in results["files"]["actual"]
    served.lab.run(["mv", f"{path}.kept", path], check=True)
    served.stackctl("restart", "cpu")
    assert failed(verify(served)) == set()


def test_what_does_not_run(served: Seat) -> None:
    done = served.stackctl("verify", "nothing", code=4)
    look.assert_error(done, "no stack named nothing", "cpu")
    served.systemctl("stop", look.engine_unit(served))
    done = served.stackctl("verify", code=3)
    look.assert_error(done, r"cpu is not running \(inactive\)", "stackctl restart cpu")
    found = json.loads(served.stackctl("verify", "cpu", "--json", code=3).stdout)
    assert (found["schema"], found["exit_code"]) == ("stackctl.error/1", 3)
    served.stackctl("restart", "cpu")
    assert failed(verify(served)) == set()


@pytest.mark.deep
def test_a_model_that_could_not_be_locked(one: Seat) -> None:
    lock = (
        "--set",
        "engine_args.load-mode=mmap+mlock",
        "--set",
        "front_door=off",
        "--set",
        "port=8087",
    )
    one.stackctl("up", "cpu-latency", "--name", "large", "--model", look.GEMMA, *lock)
    pid = look.engine_pid(one, look.engine_container(one, "large"))
    limits = one.lab.read(f"/proc/{pid}/limits")
    soft = next(line.split()[3] for line in limits.splitlines() if "locked memory" in line)
    if soft == "unlimited" or int(soft) > 256 * 2**20:
        pytest.skip("this machine may lock it")
    results = verify(one, "large", code=1)
    assert failed(results) == {"locked"}
    assert results["locked"]["actual"] == "0 B of 235 MiB"
    evidence = results["locked"]["evidence"]
    assert "llama.cpp: failed to mlock" in evidence
    assert f"the limit of its process is {int(soft) // 2**20} MiB" in evidence


@pytest.mark.deep
def test_an_image_with_a_user_of_its_own(one: Seat, tiny: str) -> None:
    """It runs as a subordinate ID, and other users cannot read such a process."""
    script = f"""
        id=$(podman create --pull=never {IMAGE} llama-server)
        podman commit --quiet --change USER=1234 "$id" localhost/lab/user:1
        podman rm "$id"
    """
    one.run("sh", "-ec", script)
    more = ("--set", "image=localhost/lab/user:1", "--set", "front_door=off")
    one.stackctl(
        "up", "cpu-latency", "--name", "other", "--model", tiny, *more, "--set", "port=8088"
    )
    pid = look.engine_pid(one, look.engine_container(one, "other"))
    assert look.process_status(one.lab, pid)["Uid"].split()[0] == "101233"
    assert one.run("cat", f"/proc/{pid}/environ", check=False).returncode != 0
    results = verify(one, "other")
    wrong = {name for name, one in results.items() if one["status"] in ("fail", "warn", "skip")}
    assert wrong <= NOISE, {name: results[name] for name in wrong}
    assert results["ports"]["actual"] == "127.0.0.1:8088"
