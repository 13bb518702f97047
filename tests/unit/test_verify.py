"""Expected against actual: each mismatch with its cause and remedy, what is not known never ok."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from samples import CARD, EPYC_GPU, GEMMA, GIB, HOSTS, MIB, machine, plan, profile, shipped

from stackctl.cli.output import Output
from stackctl.diagnose.verify_process import verify_inspection
from stackctl.engines import engine
from stackctl.engines.options import int_option_in_argv
from stackctl.observe.procfs import is_below, numa_pages
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import EngineFact, Generation, Outcome, UnitSet
from stackctl.values.inspection import (
    Drift,
    EngineProcess,
    EngineThread,
    FileState,
    GpuUse,
    Inspection,
    ListeningSocket,
    Neighbour,
    NodeBytes,
    ObservedModelFile,
    ObservedProxy,
    Pages,
)
from stackctl.values.model import Model, ModelFile
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides
from stackctl.values.proxy import Proxy
from stackctl.values.result import Result

STARTED = 1_800_000_000.0
PID = 315
#: Two nodes, of which each has eight cores and half of the memory.
TWO = machine(cores=[str(n) for n in range(16)], nodes=["0-7", "8-15"], memory=128 * GIB)
FILE = FileState(
    device=74, inode=42, bytes=GEMMA.files[0].bytes, content_changed=STARTED - 99,
    changed=STARTED - 99,
)  # fmt: skip


def generation(planned: Plan, **changes: Any) -> Generation:
    values: dict[str, Any] = {
        "number": 3, "stack": planned.stack, "created": "2026-11-28T12:00:00Z", "image": "x",
        "image_id": "9ba14e339977" + "0" * 52, "plan": planned, "host": HOSTS["lab"],
        "units": UnitSet(
            stack=planned.stack, service="cpu.service", container="stackctl-cpu", files=()
        ),
        "outcome": Outcome(state="ready", changed="2026-11-28T12:00:01Z"),
        "asked": Overrides(model="file:/srv/a b.gguf", sets=("context=4096",)),
        **changes,
    }  # fmt: skip
    return Generation(**values)


def spread(kind: Any, policy: str, *held: int) -> Pages:
    nodes = tuple(NodeBytes(node=n, bytes=size) for n, size in enumerate(held))
    return Pages(kind=kind, policy=policy, nodes=nodes)


def honest(given: Generation, **changes: Any) -> Inspection:
    """What is seen of a generation that runs exactly as it was planned."""
    planned = given.plan
    placement = planned.placement
    nodes = placement.mems or (0,)
    policy = placement.policy if placement.policy == "default" else (
        f"{placement.policy}:{placement.mems}"
    )  # fmt: skip
    options = engine(planned.engine).threads_options
    count = (int_option_in_argv(planned.argv, options[0]) if options else None) or 2
    weights, own = planned.model.weights_bytes, 100 * MIB
    share = len(nodes)
    threads = [
        EngineThread(
            process=PID, id=PID + n, cpus=placement.cpus, computed_ns=ran, waited_ns=ran // 50
        )
        for n, ran in enumerate([300_000_000] * count + [4_000_000] * 9)
    ]
    listening = [
        ListeningSocket(protocol="tcp", address="127.0.0.1", port=planned.engine_listen_port,
            owner="engine",
                  process="llama-server (process 315)")
    ]  # fmt: skip
    door = None
    if given.door is not None:
        door = ObservedProxy(state="up", port=planned.engine_listen_port)
        listening.append(
            ListeningSocket(protocol="tcp", address=given.door.address, port=given.door.port,
                      owner="door", process="haproxy (process 324)")
        )  # fmt: skip
    values: dict[str, Any] = {
        "pid": PID,
        "started": STARTED,
        "argv": planned.argv,
        "environment": planned.environment,
        "by_unit": True,
        "processes": (
            EngineProcess(
                id=PID, command="llama-server", own_bytes=own, file_bytes=weights, huge_bytes=0,
                locked_bytes=weights if planned.memlock_bytes else 0,
                pages=(
                    spread("model", policy, *[weights // share] * share),
                    spread("anonymous", policy, *[own // share] * share),
                ),
            ),
        ),
        "threads": tuple(threads),
        "watched": "over 64 tokens",
        "watched_s": 0.5,
        "mems": placement.mems,
        "cpuset_cpus": placement.cpus if placement.cpuset else None,
        "cpuset_mems": placement.mems if placement.cpuset else None,
        "cpuset_controller": placement.cpuset,
        "memlock_bytes": 8 * MIB,
        "hugepages": "madvise",
        "listening": tuple(listening),
        "files": (
            ObservedModelFile(path=GEMMA.files[0].path, planned_bytes=FILE.bytes, now=FILE,
                          engine=FILE),
        ),
        "image_id": given.image_id,
        "restarts": 0,
        "model": Result(name="model", status="ok", actual=planned.served_name),
        "report": engine(planned.engine).expected_facts(planned.argv),
        "door": door,
        **changes,
    }  # fmt: skip
    return Inspection(**values)


def results(given: Generation, **changes: Any) -> dict[str, Result]:
    """The results by name; mismatches come first, and say what to do."""
    found = verify_inspection(given, honest(given, **changes))
    ranks = [{"fail": 0, "warn": 1}.get(result.status, 2) for result in found]
    assert ranks == sorted(ranks)
    for result in found:
        assert result.actual or result.status == "skip", result
        if result.status == "fail":
            assert result.remedy or result.evidence, result
            assert result.expected, result
        if result.status == "skip":
            assert result.evidence, result
    named = {result.name: result for result in found}
    assert len(named) == len(found)
    return named


def wrong(found: dict[str, Result]) -> set[str]:
    return {name for name, result in found.items() if result.status == "fail"}


LOCKED = generation(plan(HOSTS["epyc-nps1"], GEMMA))
BY_HAND = Drift(code="unit", text="/etc/cpu.container was changed by hand")
OTHER_DOOR = Drift(code="door", text="the front door's x is not as this stackctl writes it")
LAB = generation(plan(HOSTS["lab"], GEMMA))
SPREAD = generation(plan(TWO, GEMMA))
BOUND = generation(plan(TWO, GEMMA, profile(placement={"nodes": "0", "policy": "bind"})))
DOOR = generation(
    plan(HOSTS["lab"], GEMMA, engine_port=29080, door_reason="test"),
    door=Proxy(port=8080, engine_port=29080, health_path="/health", image="x"),
)


@pytest.mark.parametrize("given", [LOCKED, LAB, SPREAD, BOUND, DOOR])
def test_what_is_as_planned(given: Generation) -> None:
    found = results(given)
    odd = {n: r for n, r in found.items() if r.status not in ("ok", "info")}
    assert not odd, odd


def test_what_is_said_of_it() -> None:
    found = results(DOOR)
    assert found["argv"].actual == f"as planned ({len(DOOR.plan.argv) - 1} arguments)"
    assert found["cpus"].actual == "0-1, every thread"
    assert found["memory"].actual == "node 0 holds 100 % of 335 MiB"
    assert found["ports"].actual == "127.0.0.1:29080 and 127.0.0.1:8080"
    assert found["door"].actual == "open, leads to generation 3 (port 29080)"
    assert "services may lock 8 MiB" in (found["locked"].actual or "")
    assert results(LOCKED)["locked"].actual == "235 MiB of 235 MiB"
    assert results(BOUND)["cpuset"].actual == "CPUs 0-7, memory nodes 0"


def seen(change: Callable[[Inspection], dict[str, Any]], given: Generation) -> dict[str, Result]:
    return results(given, **change(honest(given)))


def processes(one: Inspection, **changes: Any) -> dict[str, Any]:
    return {"processes": (msgspec.structs.replace(one.processes[0], **changes),)}


def files(**changes: Any) -> dict[str, Any]:
    return {"files": (msgspec.structs.replace(honest(LAB).files[0], **changes),)}


def touched(**changes: Any) -> FileState:
    return msgspec.structs.replace(FILE, **changes)


def listens(
    address: str, port: int, owner: Any = "engine", protocol: Any = "tcp"
) -> ListeningSocket:
    return ListeningSocket(
        protocol=protocol, address=address, port=port, owner=owner, process="python3 (process 9)"
    )


#: What is changed, the name that must fail, and words of its actual value, evidence and remedy.
MISMATCHES: dict[str, tuple[Generation, Callable[[Inspection], dict[str, Any]], str, str]] = {
    "started by hand": (
        LAB, lambda _: {"by_unit": False}, "unit",
        "started by hand .* not the main process of cpu.service .* stackctl restart cpu",
    ),
    "unit edited": (
        LAB, lambda _: {"drift": (BY_HAND,)}, "unit",
        "changed by hand .* stackctl up cpu-latency --model 'file:/srv/a b.gguf' "
        "--set context=4096",
    ),
    "an argument": (
        LAB, lambda one: {"argv": tuple("4097" if w == "8192" else w for w in one.argv or ())},
        "argv", "--ctx-size 4097 instead of 8192 .* started otherwise .* restart",
    ),
    "an argument more": (
        LAB, lambda one: {"argv": (*(one.argv or ()), "--lora", "x")}, "argv",
        "--lora is not planned",
    ),
    "a variable that engines read": (
        LAB, lambda _: {"unplanned": ("LLAMA_ARG_TOP_K",)}, "environment",
        "LLAMA_ARG_TOP_K is not planned, and engines read it",
    ),
    "fewer CPUs": (
        LAB, lambda one: {"threads": tuple(msgspec.structs.replace(t, cpus=CpuList([1]))
                                           for t in one.threads)},
        "cpus", "1, all 11 threads .* no thread may use CPU 0.* taskset",
    ),
    "a CPU that is offline": (
        LAB, lambda one: {"online": CpuList([0]),
                          "threads": tuple(msgspec.structs.replace(t, cpus=CpuList([0]))
                                                          for t in one.threads)},
        "cpus", "0, all 11 threads .* has CPU 1 no more: offline.* chcpu --enable 1; then "
        "stackctl restart cpu",
    ),
    "no cpuset": (
        BOUND, lambda _: {"cpuset_cpus": None, "cpuset_controller": False}, "cpuset",
        "none .* not delegated .* stackctl doctor",
    ),
    "another cpuset": (
        BOUND, lambda _: {"cpuset_cpus": CpuList(range(4))}, "cpuset", "CPUs 0-3",
    ),
    "a cpuset of other nodes": (
        BOUND, lambda _: {"cpuset_mems": CpuList([0, 1])}, "cpuset", "memory nodes 0-1",
    ),
    "more threads": (
        LAB,
        lambda one: {
            "argv": tuple(_threads(one, "4")),
            "threads": tuple(msgspec.structs.replace(t, computed_ns=2 * 10**8)
                             for t in one.threads[:4]) + one.threads[4:],
        },
        "threads", "4 of 11 compute .* started with --threads 4; more threads than its 2 CPUs",
    ),
    "a pinned neighbour": (
        LAB,
        lambda _: {"neighbours": (Neighbour(pid=9, command="python3", share=0.5, wanted=0.99,
                                            cpus=CpuList.parse("0"), pinned=True),)},
        "cores", r"python3 \(process 9\) is pinned to CPU 0 .* wants 99 % of it and got 50 %",
    ),
    "another policy": (
        SPREAD, lambda one: processes(one, pages=(spread("anonymous", "default", 9, 9),)),
        "policy", "default .* NUMAPolicy=",
    ),
    "the page cache of an earlier run": (
        SPREAD,
        lambda one: processes(one, pages=(
            spread("model", "interleave:0-1", 235 * MIB, 0),
            spread("anonymous", "interleave:0-1", 60 * MIB, 60 * MIB),
        )),
        "memory",
        "node 0 83 %, node 1 17 % of 355 MiB .* page cache already, placed by an earlier run"
        ".*dd if=/srv/models/gemma-3-270m-it-Q4_K_M.gguf iflag=nocache count=0; stackctl up",
    ),
    "memory on the wrong node": (
        BOUND, lambda one: processes(one, pages=(spread("anonymous", "bind:0", 1, 9 * MIB),)),
        "memory", "node 0 0 %, node 1 100 % of 9.0 MiB .* policy that was planned is not in effect",
    ),
    "a limit on locked memory": (
        LOCKED,
        lambda one: processes(one, locked_bytes=0)
        | {"log": (EngineFact(name="mlock", value="failed to mlock 9-byte buffer"),)},
        "locked", "0 B of 235 MiB .* failed to mlock 9-byte buffer; the limit .* is 8 MiB .* "
        "provision --only memlock",
    ),
    "more memory": (
        LAB, lambda one: processes(one, own_bytes=4 * GIB), "resident",
        r"4.2 GiB of \d+ MiB planned .*cache-ram",
    ),
    "a port for everybody": (
        LAB, lambda one: {"listening": (*(one.listening or ()), listens("0.0.0.0", 9999))},
        "ports", "also tcp 0.0.0.0:9999, which other machines may reach",
    ),
    "a UDP port for everybody": (
        LAB, lambda one: {"listening": (*(one.listening or ()), listens("::", 9, protocol="udp"))},
        "ports", r"also udp \[::\]:9, which other machines may reach",
    ),
    "a port that is closed": (
        LAB, lambda _: {"listening": ()}, "ports", "nobody listens on 127.0.0.1:8080",
    ),
    "a port that somebody shares": (
        LAB, lambda one: {"listening": (*(one.listening or ()), listens("127.0.0.1", 8080,
                                                                       "other"))},
        "ports", r"127.0.0.1:8080 is also python3 \(process 9\)'s",
    ),
    "a port that somebody has": (
        LAB, lambda _: {"listening": (listens("127.0.0.1", 8080, "other"),)}, "ports",
        r"127.0.0.1:8080 is python3 \(process 9\)'s",
    ),
    "a port that somebody has at every address": (
        LAB, lambda _: {"listening": (listens("0.0.0.0", 8080, "other"),)}, "ports",
        r"0.0.0.0:8080 is python3 \(process 9\)'s",
    ),
    "another context": (
        LAB, lambda one: {"report": tuple(msgspec.structs.replace(f, value="4096")
                                          if f.name == "context" else f for f in one.report)},
        "context", "4096",
    ),
    "another model": (
        LAB,
        lambda _: {"model": Result(name="model", status="fail", expected="a", actual="b")},
        "model", "b .* own port",
    ),
    "another image": (
        LAB, lambda _: {"image_id": "f" * 64}, "image", "ffffffffffff .* another image",
    ),
    "a model file that is gone": (LAB, lambda _: files(now=None), "files", "is gone"),
    "a model file that was replaced": (
        LAB, lambda _: files(now=touched(inode=43, changed=STARTED + 1)), "files",
        "was replaced .* before .* stackctl restart cpu",
    ),
    "a model file without a name": (LAB, lambda _: files(deleted=True), "files", "was replaced"),
    "a model file of another size": (
        LAB, lambda _: files(now=touched(bytes=7)), "files", "another size .* 7 bytes",
    ),
    "a model file that was written to": (
        LAB, lambda _: files(now=touched(content_changed=STARTED + 1)), "files", "was written to",
    ),
    "a door to another engine": (
        DOOR, lambda _: {"door": ObservedProxy(state="up", port=1)}, "door", "leads to port 1 ",
    ),
    "a door that holds": (
        DOOR, lambda _: {"door": ObservedProxy(state="held", port=29080)}, "door", "holds requests",
    ),
}  # fmt: skip


def _threads(one: Inspection, count: str) -> list[str]:
    words = list(one.argv or ())
    words[words.index("--threads") + 1] = count
    return words


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch(name: str) -> None:
    given, change, what, words = MISMATCHES[name]
    found = seen(change, given)
    assert what in wrong(found)
    # What differs in one way is not called wrong in others, but where it follows.
    follows = {"more threads": {"threads", "argv"}}.get(name, {what})
    assert wrong(found) == follows
    one = found[what]
    told = " | ".join(filter(None, (one.actual, one.evidence, one.remedy)))
    assert re.search(words, told), told


@pytest.mark.parametrize(
    ("given", "changes", "name", "words"),
    [
        (LAB, {"restarts": 2}, "restarts", "2 times"),
        (
            LAB,
            {"drift": (OTHER_DOOR,)},
            "unit",
            "door",
        ),
        (LAB, files(now=touched(changed=STARTED + 1)), "files", "was touched"),
    ],
)
def test_a_warning(given: Generation, changes: dict[str, Any], name: str, words: str) -> None:
    found = results(given, **changes)
    assert not wrong(found)
    assert found[name].status == "warn"
    assert words in (found[name].actual or "")


def test_a_file_with_a_space_is_one_word_of_the_remedy() -> None:
    file = ModelFile(path="/srv/my models/a.gguf", bytes=FILE.bytes)
    given = generation(plan(TWO, msgspec.structs.replace(GEMMA, files=(file,))))
    one = honest(given)
    found = results(
        given, **processes(one, pages=(spread("model", "interleave:0-1", 235 * MIB, 0),))
    )["memory"]
    assert "dd 'if=/srv/my models/a.gguf' iflag=nocache" in (found.remedy or "")


def test_the_same_port_at_another_address_is_not_in_the_way() -> None:
    other = listens("192.0.2.1", 8080, "other")
    one = honest(LAB)
    found = results(LAB, listening=(*(one.listening or ()), other))["ports"]
    assert (found.status, found.actual) == ("ok", "127.0.0.1:8080")


def test_threads_that_wait_name_who_is_in_their_way() -> None:
    busy = honest(LAB)
    waiting = tuple(msgspec.structs.replace(t, waited_ns=t.computed_ns) for t in busy.threads)
    other = Neighbour(
        pid=9, command="cc1", share=0.5, wanted=1, cpus=CpuList.parse("0-1"), pinned=False
    )
    found = results(LAB, threads=waiting, neighbours=(other,))["cores"]
    assert found.status == "warn"
    assert found.actual == "its threads waited 50 % of their time for a CPU"
    assert found.evidence == "cc1 (process 9) wants 100 % of a CPU on 0-1"
    crowd = tuple(msgspec.structs.replace(t, computed_ns=10**8, waited_ns=10**8) for t in waiting)
    found = results(LAB, threads=crowd)["cores"]
    assert found.evidence == "11 of its own threads share 2 CPUs"
    # A neighbour that leaves room is none.
    assert results(LAB, neighbours=(other,))["cores"].status == "ok"


def test_a_thread_that_was_kept_from_its_cpu_is_no_mismatch() -> None:
    one = honest(LAB)
    stuck = (one.threads[0], msgspec.structs.replace(one.threads[1], computed_ns=1))
    log = (EngineFact(name="threads", value="2"),)
    found = results(LAB, threads=(*stuck, *one.threads[2:]), log=log)["threads"]
    assert (found.status, found.actual) == ("warn", "1 of 11 compute (over 64 tokens)")


def test_cpus_that_the_scheduler_chooses() -> None:
    given = generation(plan(machine(cores=[str(n) for n in range(16)], nodes=["0-15"],
                                    memory=64 * GIB, tools=HOSTS["lab"].tools), GEMMA))  # fmt: skip
    assert not given.plan.placement.cpuset
    wide = tuple(msgspec.structs.replace(t, cpus=CpuList(range(16))) for t in honest(given).threads)
    found = results(given, threads=wide)["cpus"]
    assert (found.status, found.actual) == (
        "info", "0-15; 0-13 are meant, the scheduler decides",
    )  # fmt: skip
    # Where a cpuset was planned, it is a mismatch.
    bound = generation(msgspec.structs.replace(
        given.plan, placement=msgspec.structs.replace(given.plan.placement, cpuset=True)
    ))  # fmt: skip
    assert wrong(results(bound, threads=wide)) == {"cpus"}


# What cannot be seen


UNSEEN: dict[str, dict[str, Any]] = {
    "argv": {"argv": None},
    "environment": {"environment": None},
    "cpus": {"threads": ()},
    "threads": {"threads": (EngineThread(process=PID, id=PID, cpus=CpuList.parse("0-1")),)},
    "cores": {"threads": ()},
    "policy": {"processes": (EngineProcess(id=PID, command="x"),)},
    "memory": {"processes": ()},
    "resident": {"processes": (EngineProcess(id=PID, command="x"),)},
    "hugepages": {"processes": (EngineProcess(id=PID, command="x"),)},
    "ports": {"listening": None},
    "model": {"model": None},
    "context": {"report": ()},
    "slots": {"report": ()},
    "files": files(engine=None),
    "image": {"image_id": None},
    "restarts": {"restarts": None},
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_seen_is_not_ok(name: str) -> None:
    why = ((name, "the kernel does not show it"),)
    found = results(LAB, **UNSEEN[name], missing=why)
    assert found[name].status == "skip"
    assert found[name].actual is None
    assert not wrong(found)


def test_nothing_is_seen_at_all() -> None:
    """A process that ended during the inspection leaves nothing to compare, and no error."""
    for given in (LAB, LOCKED, SPREAD, BOUND, DOOR):
        found = verify_inspection(given, Inspection(pid=PID))
        assert {result.status for result in found} <= {"skip", "ok"}
        assert [result.name for result in found if result.status == "ok"] == ["unit"]


def test_an_engine_that_computes_nothing_proves_nothing() -> None:
    idle = tuple(msgspec.structs.replace(t, computed_ns=5) for t in honest(LAB).threads)
    found = results(LAB, threads=idle, watched="while it did not answer: no answer within 20 s")
    assert found["threads"].status == "skip"
    assert "did not answer" in (found["threads"].evidence or "")


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=False, quiet=False, verbose=False, color="never", progress=False)
    given, change, _, _ = MISMATCHES["a limit on locked memory"]
    evidence = honest(given, **change(honest(given)), argv=None)
    why = "the kernel does not show /proc/315/cmdline to this user"
    missing = (("argv", why),)
    out.results(verify_inspection(given, msgspec.structs.replace(evidence, missing=missing)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL  locked       0 B of 235 MiB"
    assert f"skip  argv         {why}" in lines
    # A command is never wrapped: it is there to be pasted.
    assert all(len(line) <= 80 for line in lines if "fix: " not in line)


# Nodes


#: A llama-server on two nodes as the kernel tells it, shortened: /proc/PID/numa_maps.
NUMA_MAPS = """\
555fde5c2000 interleave:0-1 file=/usr/bin/llama-server mapped=2 N0=2 kernelpagesize_kB=4
555fffe00000 interleave:0-1 heap anon=1792 dirty=1792 N0=896 N1=896 kernelpagesize_kB=4
7f0b30694000 interleave:0-1 file=/models/a\\040b.gguf mapped=57804 mapmax=2 N0=57804 kernelpagesize_kB=4
7f0b3c000000 interleave=static:0-1 anon=1024 dirty=1024 N0=512 N1=512 kernelpagesize_kB=4
7f0b40000000 weighted interleave:0-1 anon=10 dirty=10 N0=8 N1=2 kernelpagesize_kB=4
7f0b41000000 prefer (many):1 anon=1 dirty=1 N1=1 kernelpagesize_kB=4
7f0b42000000 bind:1 file=/dev/shm/x huge anon=3 dirty=3 N1=3 kernelpagesize_kB=2048
7f0b43000000 default
7f0b44000000 default file=/models/a\\040b.gguf\\040(deleted) mapped=1 N1=1 kernelpagesize_kB=4
broken line
7ffd178a0000 default stack:315 anon=33 dirty=33 active=0 N9= N=3 kernelpagesize_kB=4
"""  # noqa: E501


def test_pages_of_a_machine_with_two_nodes() -> None:
    found = {
        (one.kind, one.policy): {held.node: held.bytes // 4096 for held in one.nodes}
        for one in numa_pages(NUMA_MAPS, is_below(["/models/a b.gguf"]))
    }
    assert found == {
        ("file", "interleave:0-1"): {0: 2},
        ("anonymous", "interleave:0-1"): {0: 896, 1: 896},
        ("model", "interleave:0-1"): {0: 57804},
        ("anonymous", "interleave=static:0-1"): {0: 512, 1: 512},
        ("anonymous", "weighted interleave:0-1"): {0: 8, 1: 2},
        ("anonymous", "prefer (many):1"): {1: 1},
        ("shared", "bind:1"): {1: 3 * 512},
        ("model", "default"): {1: 1},
    }
    assert numa_pages("", is_below(["/models"])) == ()


def test_pages_on_the_wrong_node_are_found_in_what_the_kernel_wrote() -> None:
    two = numa_pages(NUMA_MAPS, is_below(["/models/a b.gguf"]))
    found = results(SPREAD, **processes(honest(SPREAD), pages=two))
    assert wrong(found) == {"memory"}
    assert found["policy"].status == "ok"
    assert "placed by an earlier run" in (found["memory"].evidence or "")


def test_a_preferred_node_may_be_full() -> None:
    placement = msgspec.structs.replace(
        SPREAD.plan.placement, policy="preferred", mems=CpuList([0])
    )
    made = msgspec.structs.replace(SPREAD.plan, placement=placement)
    given = msgspec.structs.replace(SPREAD, plan=made)
    # As /proc/PID/numa_maps says it: the kernel's word is shorter than systemd's.
    pages = (spread("anonymous", "prefer:0", 60 * MIB, 60 * MIB),)
    found = results(given, **processes(honest(given), pages=pages))
    assert (found["policy"].status, found["policy"].actual) == ("ok", "prefer:0")
    assert (found["memory"].status, found["memory"].expected) == (
        "info", "on node 0, as it has room"
    )  # fmt: skip
    other = (spread("anonymous", "prefer:1", 1, 1),)
    assert results(given, **processes(honest(given), pages=other))["policy"].status == "fail"


def test_many_nodes_are_told_by_their_extremes() -> None:
    given = generation(plan(HOSTS["epyc-l3numa"], GEMMA))
    found = results(given)["memory"]
    assert found.status == "ok"
    assert found.actual == "16 nodes hold 6-6 % of 335 MiB each"


# GPUs and vLLM


def gpu(weights: int = 20 * GIB) -> Generation:
    wish = shipped("gpu-nvfp4")
    model = Model(
        source="dir:/srv/m", format="safetensors", architecture="llama", parameters=39_000_000_000,
        quantization="nvfp4", quantization_method="modelopt", weights_bytes=weights, layers=80,
        context=32768, embedding=5120, folder="/srv/m", kv=msgspec.structs.replace(
            GEMMA.kv, kv_heads=(8,) * 80, key_dim=128, value_dim=128, sliding_window=None,
            sliding_layers=0, sliding=(),
        ) if GEMMA.kv else None, files=GEMMA.files,
    )  # fmt: skip
    return generation(plan(EPYC_GPU, model, wish))


GPU = gpu()
LOG = (
    EngineFact(name="kv_cache_bytes", value=str(GPU.plan.memory.kv_bytes)),
    EngineFact(name="kv_cache_tokens", value="203120"),
    EngineFact(name="max_concurrency", value="6.2"),
    EngineFact(name="quantization", value="modelopt_fp4"),
    EngineFact(name="device", value="cuda"),
    EngineFact(name="linear_backend", value="FlashInferCutlassNvFp4LinearKernel"),
)


def held(size: int | None = GPU.plan.memory.total_bytes) -> dict[str, Any]:
    return {"log": LOG, "gpus": (GpuUse(gpu=0, pid=PID, memory_bytes=size),)}


def test_vllm_on_a_gpu() -> None:
    assert CARD.index == 0
    found = results(GPU, **held())
    assert not wrong(found)
    assert found["gpu"].status == found["kv-cache"].status == found["quantization"].status == "ok"
    assert "203,120 tokens, 6 requests at once" in (found["kv-cache"].actual or "")
    assert found["backends"].actual == "linear FlashInferCutlassNvFp4LinearKernel"


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"gpus": ()}, "gpu", "no process of it holds memory of GPU 0"),
        (held(GIB), "gpu", "1 GiB of"),
        ({"log": (*LOG, EngineFact(name="device", value="cpu"))}, "gpu", "its log says cpu"),
        ({"log": (*LOG, EngineFact(name="quantization", value="None"))}, "quantization", "none"),
        ({"log": (*LOG, EngineFact(name="kv_cache_tokens", value="9"))}, "kv-cache", "9 tokens"),
    ],
)
def test_a_silent_way_out(changes: dict[str, Any], name: str, words: str) -> None:
    found = results(GPU, **(held() | changes))
    assert wrong(found) == {name}
    assert words in (found[name].actual or "")


def test_gpu_memory_that_the_driver_does_not_tell() -> None:
    assert results(GPU, **held(None))["gpu"].status == "info"
    found = results(GPU, log=LOG, missing=(("gpu", "no NVIDIA driver"),))
    assert (found["gpu"].status, found["gpu"].evidence) == ("skip", "no NVIDIA driver")
