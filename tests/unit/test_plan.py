"""Plans: golden ones for known machines, and what is true of all."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    CARD,
    EPYC,
    EPYC_GPU,
    GEMMA,
    GIB,
    HOSTS,
    IQUEST,
    LATENCY,
    LLAMA_CPP,
    MIB,
    MODELS,
    OLD_HELP,
    SHARED,
    THROUGHPUT,
    facts_of,
    machine,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.engines.vllm.memory import kv_token_bytes
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.machine import RecordedMachine
from stackctl.plan.claimed_resources import claim_of
from stackctl.probe import probe
from stackctl.quantity import format_bytes
from stackctl.resources import data_folder
from stackctl.sources.profiles import Profiles
from stackctl.values.base import from_json, to_json, to_plain
from stackctl.values.cpu_list import CpuList
from stackctl.values.engine_facts import EngineOption
from stackctl.values.host import UNLIMITED, Bandwidth, Gpu, Host, Memory, NumaNode
from stackctl.values.model import Model
from stackctl.values.plan import Claim, GpuShare, MemoryBudget, Plan
from stackctl.values.profile import Profile

PROFILES = {"latency": LATENCY, "throughput": THROUGHPUT}


def decided(made: Plan) -> dict[str, Any]:
    assert len({d.field for d in made.decisions}) == len(made.decisions)
    return {d.field: d.value for d in made.decisions}


def reason(made: Plan, field: str) -> str:
    return next(d.reason for d in made.decisions if d.field == field)


def values_of(made: Plan, option: str) -> list[str]:
    """What follows an option, each time it is given."""
    pairs = zip(made.argv, made.argv[1:], strict=False)
    return [after for token, after in pairs if token == f"--{option}"]


# Golden plans


def summary(made: Plan) -> str:
    """What matters of a plan, one thing a line."""
    argv: list[str] = []
    for token in made.argv:
        if token.startswith("--") or not argv:
            argv.append(token)
        else:
            argv[-1] += f" {token}"
    document = {
        "model": made.model.source,
        "image": made.image,
        "argv": argv,
        "placement": to_plain(made.placement),
        "memlock_bytes": made.memlock_bytes,
        "memory": sizes(made.memory),
        "host_memory": None if made.host_memory is None else sizes(made.host_memory),
        "prediction": to_plain(made.prediction),
        "verdict": to_plain(made.verdict),
        "timing": to_plain(made.timing),
        "decisions": {
            d.field: f"{json.dumps(d.value)} [{d.source}] {d.reason}" for d in made.decisions
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def sizes(budget: MemoryBudget) -> dict[str, Any]:
    """A budget, bytes for people too."""
    return {
        name: f"{size} ({format_bytes(size)})" if isinstance(size, int) else size
        for name, size in to_plain(budget).items()
    }


SHIPPED = Profiles([data_folder("profiles")]).names()
CASES = [(host, name) for host in HOSTS for name in SHIPPED]
JOINT = ("gpu-nvfp4", "cpu-moe-batch")


@pytest.mark.parametrize(("host", "name"), CASES, ids=lambda part: str(part))
def test_golden_plans(host: str, name: str, golden: Callable[[str, str], None]) -> None:
    wish = shipped(name)
    try:
        text = summary(plan(HOSTS[host], shipped_model(wish), wish))
    except StackctlError as error:
        refused = {
            "error": error.message,
            "hint": error.hint,
            "details": list(error.details),
            "exit_code": int(error.exit_code),
        }
        text = json.dumps(refused, indent=2, ensure_ascii=False) + "\n"
    golden(f"plans/{host}--{name}.json", text)


@pytest.mark.parametrize("order", [JOINT, JOINT[::-1]], ids=lambda order: f"{order[0]}-first")
def test_golden_joint_plans(order: tuple[str, str], golden: Callable[[str, str], None]) -> None:
    """The two stacks of the reference box together, whichever came first."""
    first, second = (shipped(name) for name in order)
    before = plan(EPYC_GPU, shipped_model(first), first)
    claim = claim_of(before)
    after = plan(EPYC_GPU, shipped_model(second), second, claims=(claim,))
    for made in (before, after):
        assert (made.verdict.fits, made.verdict.viable) == (True, True)
    cpus = {made.profile: made.placement.cpus for made in (before, after)}
    assert cpus == {"gpu-nvfp4": CpuList.parse("14-15"), "cpu-moe-batch": CpuList.parse("0-13")}
    assert before.port != after.port
    assert decided(after if order[1] == "cpu-moe-batch" else before)["threads"] == 14
    # The GPU is the one's alone: what was first takes nothing from what it gets.
    on_gpu = next(made for made in (before, after) if made.placement.gpus)
    alone = plan(EPYC_GPU, on_gpu.model, shipped("gpu-nvfp4"))
    assert on_gpu.memory == alone.memory
    assert on_gpu.argv == alone.argv
    golden(
        f"plans/joint--{order[0]}-first.json",
        f"{to_json(claim)}{summary(before)}{summary(after)}",
    )


def test_no_golden_plan_is_left_over() -> None:
    folder = Path(__file__).parents[1] / "golden" / "plans"
    expected = {"--".join(case) for case in CASES} | {f"joint--{name}-first" for name in JOINT}
    assert {path.stem for path in folder.iterdir()} == expected


@pytest.mark.parametrize(
    ("archive", "name"), [("epyc-9175f-nps1", "epyc-nps1"), ("epyc-9175f-l3numa", "epyc-l3numa")]
)
def test_the_recorded_machines_plan_like_the_written_ones(
    archive: str, name: str, tmp_path: Path
) -> None:
    source = SHARED / "machines" / f"{archive}.tar.gz"
    if not source.is_file():
        pytest.skip("the recorded machines are not beside this checkout")
    with tarfile.open(source) as tar:
        tar.extractall(tmp_path, filter="tar")
    root = next(path.parent for path in sorted(tmp_path.glob("**/sys")) if path.is_dir())
    recorded = probe(RecordedMachine(root), scope="system")
    written = HOSTS[name]
    # The recording knows neither tools nor limits.
    recorded = msgspec.structs.replace(recorded, tools=written.tools, limits=written.limits)
    for wish in PROFILES.values():
        assert plan(recorded, IQUEST, wish) == plan(written, IQUEST, wish)


# What those plans must say


@pytest.mark.parametrize("objective", PROFILES)
def test_the_reference_machine(objective: str) -> None:
    """16 cores, one node: 14 threads were best, NUMA has nothing to offer, the model is locked."""
    made = plan(EPYC, IQUEST, PROFILES[objective])
    value = decided(made)
    assert (value["threads"], value["threads-batch"]) == (14, 14)
    assert value["numa"] is None
    assert not values_of(made, "numa")
    assert value["load-mode"] == "mmap+mlock"
    assert made.memlock_bytes == UNLIMITED
    assert made.placement.policy == "default"
    # Two cores are kept free: the others are named.
    assert (made.placement.cpus, made.placement.cpuset) == (CpuList.parse("0-13"), True)
    assert made.verdict.fits is True
    assert values_of(made, "ctx-size") == ["8192" if objective == "latency" else "32768"]
    assert values_of(made, "host") == ["127.0.0.1"]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("objective", PROFILES)
def test_never_distribute_over_more_nodes_than_it_knows(name: str, objective: str) -> None:
    made = plan(HOSTS[name], IQUEST, PROFILES[objective])
    nodes = len(HOSTS[name].cpu.numa)
    if nodes == 1:
        assert not values_of(made, "numa")
    elif nodes > 8:
        assert values_of(made, "numa") == ["numactl"]
        assert made.placement.policy == "interleave"


def test_hyperthreads_are_not_used() -> None:
    smt, plain = plan(HOSTS["epyc-smt"]), plan(EPYC)
    assert decided(smt)["threads"] == decided(plain)["threads"] == 14
    assert smt.placement.cpus == CpuList.parse("0-13")
    assert smt.placement.cpuset
    # A user's services cannot have a cpuset there: the scheduler is trusted.
    desktop = plan(HOSTS["desktop"], GEMMA)
    assert not desktop.placement.cpuset
    assert decided(desktop)["threads"] == 7


def test_a_model_that_may_not_be_locked_is_mapped() -> None:
    made = plan(HOSTS["desktop"], GEMMA)
    assert decided(made)["load-mode"] == "mmap"
    assert made.memlock_bytes is None
    assert "8 MiB" in reason(made, "load-mode")
    just = msgspec.structs.replace(EPYC, limits=msgspec.structs.replace(
        EPYC.limits, memlock_bytes=GEMMA.files[0].bytes
    ))  # fmt: skip
    assert plan(just, GEMMA).memlock_bytes == GEMMA.files[0].bytes


def test_what_does_not_fit_says_so_with_what_to_do() -> None:
    made = plan(HOSTS["lab"], IQUEST)
    assert (made.verdict.fits, made.verdict.viable) == (False, False)
    assert made.memory.headroom_bytes is not None
    assert made.memory.headroom_bytes < 0
    assert any("too much" in text for text in made.verdict.reasons)
    assert not any("context" in text for text in made.verdict.alternatives)
    # Where the weights fit, less context helps.
    tight = machine(cores=["0"], nodes=["0"], memory=32 * GIB)
    made = plan(tight, IQUEST, profile(context=131072))
    assert made.verdict.fits is False
    assert "context" in made.verdict.alternatives[0]


def test_an_unknown_machine_plans_what_it_can() -> None:
    made = plan(Host(), IQUEST)
    value = decided(made)
    assert (value["threads"], value["threads-batch"], value["cpus"]) == (None, None, None)
    assert "--threads" not in made.argv
    assert (made.memory.limit_bytes, made.memory.headroom_bytes) == (None, None)
    assert made.verdict.fits is None
    assert made.verdict.viable is None
    assert made.verdict.reasons == (
        "memory size unknown",
        "speed not predicted: memory bandwidth unknown",
    )
    assert (made.prediction.decode_tok_s, made.prediction.prefill_tok_s) == (None, None)
    assert made.placement == msgspec.structs.replace(made.placement, cpus=None, mems=None)
    assert value["load-mode"] == "mmap"
    assert "cache-ram" not in value
    assert "0" not in (value["threads"], value["ctx-size"])


def test_a_model_that_tells_little() -> None:
    bare = msgspec.structs.replace(
        IQUEST, kv=None, context=None, embedding=None, feed_forward=None, vocabulary=None, files=()
    )
    made = plan(EPYC, bare)
    assert made.memory.kv_bytes == 0
    assert values_of(made, "ctx-size") == ["8192"]
    assert made.served_name == "iquest-coder-v1-40b-instruct.q5_k_m.gguf"


def test_a_short_model_limits_the_context() -> None:
    short = msgspec.structs.replace(IQUEST, context=2048)
    made = plan(EPYC, short, profile(context=8192))
    assert values_of(made, "ctx-size") == ["2048"]
    assert "trained" in reason(made, "ctx-size")
    assert values_of(plan(EPYC, short, profile(THROUGHPUT)), "ctx-size") == ["8192"]


def test_names_and_paths_of_a_sharded_model() -> None:
    parts = tuple(
        msgspec.structs.replace(IQUEST.files[0], path=f"/m/Big-{n:05}-of-00002.gguf")
        for n in (1, 2)
    )
    made = plan(EPYC, msgspec.structs.replace(IQUEST, files=parts))
    assert values_of(made, "model") == ["/models/Big-00001-of-00002.gguf"]
    assert made.served_name == "Big"
    named = plan(EPYC, IQUEST, profile(served_name="coder"))
    assert values_of(named, "alias") == ["coder"]


def test_the_deadline() -> None:
    made = plan(EPYC, IQUEST)
    # 28.4 GB from a hard disk at 100 MB/s, and two minutes.
    assert made.timing.deadline_s == 120 + 284
    assert made.timing.ceiling_s > made.timing.deadline_s
    given = plan(EPYC, IQUEST, deadline_s=30.4)
    assert given.timing.deadline_s == 30
    assert [d.source for d in given.decisions if d.field == "start-deadline"] == ["override"]
    assert plan(EPYC, IQUEST, deadline_s=0.1).timing.deadline_s == 1


def test_a_cgroup_limit_counts_before_the_memory_of_the_machine() -> None:
    limited = msgspec.structs.replace(
        EPYC, memory=msgspec.structs.replace(EPYC.memory, limit_bytes=16 * GIB)
    )
    made = plan(limited, IQUEST)
    assert made.verdict.fits is False
    assert "cgroup" in made.verdict.reasons[0]


# Placement


def test_placement_by_nodes() -> None:
    made = plan(HOSTS["dual-nps4"], IQUEST, profile(placement={"nodes": "1"}))
    assert made.placement.mems == CpuList.parse("1")
    assert made.placement.cpus == CpuList.parse("24-47")
    assert (made.placement.policy, made.placement.cpuset) == ("bind", True)
    assert values_of(made, "numa") == ["numactl"]
    assert decided(made)["threads-batch"] == 24
    # Only the memory of that node counts.
    assert made.memory.limit_bytes is not None
    assert made.memory.limit_bytes < 192 * GIB
    two = plan(HOSTS["dual-nps4"], IQUEST, profile(placement={"nodes": "0-1"}))
    assert (two.placement.policy, two.placement.mems) == ("interleave", CpuList.parse("0-1"))


def test_placement_by_cpus() -> None:
    made = plan(EPYC, IQUEST, profile(placement={"cpus": "0-7"}))
    assert (made.placement.cpus, made.placement.cpuset) == (CpuList.parse("0-7"), True)
    assert decided(made)["threads-batch"] == 8
    smt = plan(HOSTS["epyc-smt"], IQUEST, profile(placement={"cpus": "0-3,16-19"}))
    assert decided(smt)["threads-batch"] == 4


def test_placement_within_what_is_allowed() -> None:
    some = machine(cores=[str(n) for n in range(8)], nodes=["0-7"], memory=64 * GIB, allowed="2-5")
    made = plan(some, GEMMA)
    assert decided(made)["threads"] == 4
    assert made.placement.cpus == CpuList.parse("2-5")


@pytest.mark.parametrize(
    ("placement", "words", "hint"),
    [
        ({"cpus": "0-99"}, "may not use CPU 16-99", "CPUs: 0-15"),
        ({"cpus": ""}, "may not use CPU", "CPUs: 0-15"),
        ({"cpus": "x"}, "'x' is not a CPU list", "0-13,16"),
        ({"nodes": "3"}, "no NUMA node 3", "nodes: 0"),
        ({"nodes": ""}, "no NUMA node", "nodes: 0"),
    ],
)
def test_placement_that_the_machine_lacks(placement: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(StackctlError) as caught:
        plan(EPYC, IQUEST, profile(placement=placement))
    assert caught.value.exit_code == ExitCode.USAGE
    assert words in caught.value.message
    assert hint in (caught.value.hint or "")


def test_nodes_without_cpus() -> None:
    nodes = (
        NumaNode(id=0, cpus=CpuList.parse("0-3"), memory_bytes=32 * GIB),
        NumaNode(id=1, cpus=CpuList(), memory_bytes=64 * GIB),
        NumaNode(id=2, cpus=CpuList.parse("4-7"), memory_bytes=0),
    )
    base = machine(cores=[str(n) for n in range(8)], nodes=["0-7"], memory=96 * GIB)
    host = msgspec.structs.replace(base, cpu=msgspec.structs.replace(base.cpu, numa=nodes))
    # Memory is spread over the nodes that have any; all CPUs work.
    made = plan(host, GEMMA)
    assert (made.placement.mems, made.placement.policy) == (CpuList.parse("0-1"), "interleave")
    assert decided(made)["threads-batch"] == 7
    with pytest.raises(StackctlError, match="have no CPU") as caught:
        plan(host, GEMMA, profile(placement={"nodes": "1"}))
    assert "placement.cpus" in (caught.value.hint or "")
    given = plan(host, GEMMA, profile(placement={"nodes": "1", "cpus": "0-3"}))
    assert (given.placement.mems, given.placement.cpus) == (
        CpuList.parse("1"),
        CpuList.parse("0-3"),
    )
    with pytest.raises(StackctlError, match="no NUMA node 2"):
        plan(host, GEMMA, profile(placement={"nodes": "2"}))


def test_binding_where_the_cpuset_controller_is_not_delegated() -> None:
    with pytest.raises(StackctlError, match="cpuset") as caught:
        plan(HOSTS["desktop"], GEMMA, profile(placement={"cpus": "0-3"}))
    assert caught.value.exit_code == ExitCode.HOST
    assert "delegate" in (caught.value.hint or "").lower()


def dual_with(*nodes: int | None) -> Host:
    """The two-socket machine with cards on those nodes."""
    gpus = (msgspec.structs.replace(CARD, index=n, numa_node=at) for n, at in enumerate(nodes))
    return msgspec.structs.replace(HOSTS["dual-nps4"], gpus=tuple(gpus))


@pytest.mark.parametrize("name", ["gpu-nvfp4", "gpu-gguf"])
def test_workers_of_a_gpu_prefer_memory_beside_it(name: str) -> None:
    wish = shipped(name)
    made = plan(dual_with(5), shipped_model(wish), wish)
    assert (made.placement.policy, made.placement.mems) == ("preferred", CpuList.parse("5"))
    assert "node 5" in reason(made, "memory-policy")
    assert not values_of(made, "numa")
    # A node that is full is no reason to fail: what it claims may lie on any.
    assert claim_of(made).mems == CpuList()
    whole = HOSTS["dual-nps4"].memory.total_bytes or 0
    assert made.host_memory is not None
    assert (made.host_memory.limit_bytes or 0) > 0.9 * whole > 0


@pytest.mark.parametrize(
    ("nodes", "why"),
    [((0, 5), "GPU 0,1 are on several nodes"), ((None,), "no memory known"), ((9,), "no memory")],
)
def test_where_no_one_node_is_beside_the_gpus(nodes: tuple[int | None, ...], why: str) -> None:
    wish = shipped("gpu-nvfp4")
    made = plan(dual_with(*nodes), shipped_model(wish), profile(wish, placement={"gpus": "all"}))
    assert (made.placement.policy, made.placement.mems) == ("default", CpuList.parse("0-7"))
    assert reason(made, "memory-policy").startswith(why)


def test_experts_in_main_memory_use_the_bandwidth_of_all_nodes() -> None:
    wish = shipped("hybrid-moe")
    made = plan(dual_with(5), shipped_model(wish), wish)
    assert (made.placement.policy, made.placement.mems) == ("interleave", CpuList.parse("0-7"))
    assert values_of(made, "numa") == ["numactl"]


def test_a_gpu_s_memory_policy_may_be_the_profile_s() -> None:
    wish = shipped("gpu-nvfp4")
    for policy in ("default", "interleave"):
        asked = profile(wish, placement={"policy": policy})
        made = plan(dual_with(5), shipped_model(wish), asked)
        assert (made.placement.policy, made.placement.mems) == (policy, CpuList.parse("0-7"))
    bound = profile(wish, placement={"nodes": "5"})
    assert plan(dual_with(5), shipped_model(wish), bound).placement.policy == "bind"


def test_the_memory_policy_of_the_profile() -> None:
    made = plan(HOSTS["dual-nps4"], IQUEST, profile(placement={"policy": "default"}))
    assert made.placement.policy == "default"
    assert not values_of(made, "numa")
    assert [d.source for d in made.decisions if d.field == "memory-policy"] == ["profile"]
    wish = profile(placement={"policy": "interleave"}, overrides=("placement.policy",))
    made = plan(HOSTS["dual-nps4"], IQUEST, wish)
    assert [d.source for d in made.decisions if d.field == "memory-policy"] == ["override"]


# Explicit engine options


def test_explicit_options_win_and_show_what_was_planned() -> None:
    wish = profile(
        engine_args={"threads": (12,), "poll": (0,), "metrics": None, "no-warmup": ()},
        overrides=("engine_args.threads",),
    )
    made = plan(EPYC, IQUEST, wish)
    assert values_of(made, "threads") == ["12"]
    assert values_of(made, "poll") == ["0"]
    assert made.argv.count("--threads") == 1
    assert "--metrics" not in made.argv
    assert "--no-warmup" in made.argv
    by_field = {d.field: d for d in made.decisions}
    assert (by_field["threads"].value, by_field["threads"].source) == (12, "override")
    assert "the plan had 14: 16 cores" in by_field["threads"].reason
    assert by_field["poll"].source == "profile"
    assert by_field["metrics"].value is None
    assert "the plan had True" in by_field["metrics"].reason


def test_explicit_options_by_a_second_name_replace_the_planned_one() -> None:
    options = (
        *LLAMA_CPP.newest.options,
        EngineOption(names=("--n-gpu-layers", "--gpu-layers"), value="N"),
    )
    facts = facts_of(options)
    made = plan(EPYC, IQUEST, profile(THROUGHPUT, engine_args={"no-kv-unified": ()}), facts)
    assert "--no-kv-unified" in made.argv
    assert "--kv-unified" not in made.argv


def test_explicit_options_count_in_the_memory() -> None:
    plain = plan(EPYC, IQUEST)
    kinds: dict[str, tuple[str, ...]] = {"cache-type-k": ("q8_0",), "cache-type-v": ("q8_0",)}
    small = plan(EPYC, IQUEST, profile(engine_args=kinds))
    assert small.memory.kv_bytes * 32 == plain.memory.kv_bytes * 17
    large = plan(EPYC, IQUEST, profile(engine_args={"ctx-size": (131072,)}))
    assert large.memory.kv_bytes == 40 * GIB
    trained = plan(EPYC, IQUEST, profile(engine_args={"ctx-size": (0,)}))
    assert trained.memory.kv_bytes == 40 * GIB


def test_the_cache_of_prompts_is_told_apart_from_the_engine() -> None:
    made = plan(EPYC, IQUEST)
    mib = decided(made)["cache-ram"]
    assert made.memory.cache_bytes == mib * MIB == 8192 * MIB
    assert made.memory.compute_bytes - made.memory.cache_bytes < GIB
    assert "cache 8 GiB" in made.verdict.reasons[0]
    wish = shipped("gpu-gguf")
    on_gpu = plan(EPYC_GPU, shipped_model(wish), wish)
    assert on_gpu.host_memory is not None
    assert (on_gpu.memory.cache_bytes, on_gpu.host_memory.cache_bytes) == (0, 8192 * MIB)
    none = plan(EPYC, IQUEST, profile(engine_args={"cache-ram": (0,)}))
    assert none.memory.cache_bytes == 0
    assert "cache" not in none.verdict.reasons[0]


def test_a_gpu_allocates_the_whole_attention_mask() -> None:
    """2 B for each token of context and of micro-batch: 32,768 x 2,048 x 2 B = 128 MiB."""
    wish = shipped("gpu-gguf")
    long, short = (
        plan(EPYC_GPU, shipped_model(wish), profile(wish, context=n)) for n in (65536, 32768)
    )
    assert long.memory.compute_bytes - short.memory.compute_bytes == 128 * MIB


def test_explicit_locking() -> None:
    made = plan(EPYC, IQUEST, profile(engine_args={"load-mode": ("mmap",)}))
    assert made.memlock_bytes is None
    made = plan(HOSTS["desktop"], GEMMA, profile(engine_args={"load-mode": ("mlock",)}))
    assert made.memlock_bytes == 8 * MIB


@pytest.mark.parametrize("name", ["host", "port", "model", "alias", "api-key", "hf-token"])
def test_options_that_stackctl_sets_itself_are_refused(name: str) -> None:
    with pytest.raises(StackctlError, match=f"{name}: set by stackctl itself") as caught:
        plan(EPYC, IQUEST, profile(engine_args={name: ("x",)}))
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint


def test_a_reserved_option_by_another_name_is_refused() -> None:
    facts = facts_of(
        (*LLAMA_CPP.newest.options, EngineOption(names=("--model", "--model-path"), value="F"))
    )
    with pytest.raises(StackctlError, match="set by stackctl itself"):
        plan(EPYC, IQUEST, profile(engine_args={"model-path": ("x",)}), facts)


def test_an_option_that_the_image_does_not_know() -> None:
    facts = facts_of(LLAMA_CPP.newest.options)
    with pytest.raises(StackctlError, match="has no option --thread") as caught:
        plan(EPYC, IQUEST, profile(engine_args={"thread": (4,)}), facts)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint == "did you mean threads?"
    # Without having looked at the image, it is passed on.
    made = plan(EPYC, IQUEST, profile(engine_args={"thread": (4,)}))
    assert values_of(made, "thread") == ["4"]
    # Leaving out what is not there is no error.
    plan(EPYC, IQUEST, profile(engine_args={"thread": None}), facts)


def test_planned_options_that_an_old_image_lacks_are_left_out_and_shown() -> None:
    made = plan(EPYC, IQUEST, THROUGHPUT, facts_of(LLAMA_CPP.parse_help(OLD_HELP)))
    assert decided(made)["kv-unified"] is None
    assert "left out: this image has no --kv-unified" in reason(made, "kv-unified")
    assert decided(made)["dialect"] == "11669"


# What is true of every plan


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    per_core = draw(st.sampled_from([1, 2]))
    count = draw(st.integers(1, 24))
    step = count
    cores = [",".join(str(n + k * step) for k in range(per_core)) for n in range(count)]
    total = count * per_core
    node_count = draw(st.integers(1, min(12, count)))
    owners = [draw(st.integers(0, node_count - 1)) for _ in range(count)]
    nodes = [
        ",".join(core for core, owner in zip(cores, owners, strict=True) if owner == n)
        for n in range(node_count)
    ]
    allowed = draw(st.sets(st.integers(0, total - 1), min_size=1))
    host = machine(
        cores=cores,
        nodes=nodes,
        memory=draw(st.integers(1, 2048)) * GIB // 4,
        allowed=",".join(map(str, sorted(allowed))),
        memlock=draw(st.sampled_from([None, 0, 8 * MIB, 32 * GIB, UNLIMITED])),
        scope=draw(st.sampled_from(["user", "system"])),
        tools=draw(st.sampled_from([HOSTS["desktop"].tools, EPYC.tools, Host().tools])),
    )
    cpu = host.cpu
    if draw(st.booleans()):
        cpu = msgspec.structs.replace(cpu, siblings=())
    if draw(st.booleans()):
        cpu = msgspec.structs.replace(cpu, numa=())
    if draw(st.integers(0, 4)) == 0:
        host = msgspec.structs.replace(host, memory=Memory())
    return msgspec.structs.replace(host, cpu=cpu)


MODEL = st.sampled_from(list(MODELS.values()))
WISH = st.builds(
    profile,
    st.sampled_from([LATENCY, THROUGHPUT]),
    context=st.none() | st.integers(16, 300_000),
    concurrency=st.none() | st.integers(1, 64),
)
FACTS = st.sampled_from(
    [None, facts_of(LLAMA_CPP.newest.options), facts_of(LLAMA_CPP.parse_help(OLD_HELP), None)]
)


@settings(max_examples=120, deadline=None)
@given(hosts(), MODEL, WISH, FACTS)
def test_what_is_true_of_every_plan(host: Host, model: Any, wish: Any, facts: Any) -> None:
    made = plan(host, model, wish, facts)
    value = decided(made)
    allowed = set(host.cpu.allowed or ())
    cores = [set(core) & allowed for core in host.cpu.siblings]
    most = len([core for core in cores if core]) or len(allowed)

    assert 1 <= value["threads"] <= value["threads-batch"] <= most
    assert set(made.placement.cpus or ()) <= allowed
    if made.placement.cpuset:
        assert made.placement.cpus
        assert "cpuset" in host.tools.cgroup_controllers
    with_memory = {node.id for node in host.cpu.numa if node.memory_bytes}
    assert set(made.placement.mems or ()) <= with_memory

    memory = made.memory
    assert memory.total_bytes == memory.weights_bytes + memory.kv_bytes + memory.compute_bytes
    if memory.limit_bytes is None:
        assert (memory.headroom_bytes, made.verdict.fits) == (None, None)
    else:
        assert memory.headroom_bytes == memory.limit_bytes - memory.total_bytes
        assert made.verdict.fits is (memory.headroom_bytes >= 0)
        assert host.memory.total_bytes is not None
        assert memory.limit_bytes < host.memory.total_bytes
    if made.verdict.fits is False:
        assert made.verdict.alternatives
    if value["load-mode"] == "mmap+mlock":
        assert made.memlock_bytes is not None
        assert made.memlock_bytes >= model.weights_bytes

    context = int(values_of(made, "ctx-size")[0])
    assert context % 256 == 0
    slots = int(values_of(made, "parallel")[0])
    assert context <= -(-slots * (model.context or 0) // 256) * 256
    assert made.timing.ceiling_s > made.timing.deadline_s

    # The arguments say what was decided, once each, and nothing else.
    given_options = [token[2:] for token in made.argv if token.startswith("--")]
    assert len(given_options) == len(set(given_options))
    old_names = {"mlock", "no-mmap"}
    for decision in made.decisions:
        assert decision.reason.strip()
        assert "\n" not in decision.reason
    for name in given_options:
        assert name in old_names or value[name] is not None, name
    options = {d.field for d in made.decisions} - {
        "image", "dialect", "cpus", "memory-policy", "start-deadline"
    }  # fmt: skip
    for name in options - {"load-mode", "flash-attn"}:
        if value[name] is None:
            assert name not in given_options
        elif value[name] is not True:
            assert values_of(made, name) == [str(value[name])]
    if facts is not None:
        known = {name for option in facts.options for name in option.names}
        assert {f"--{name}" for name in given_options} <= known


@settings(max_examples=60, deadline=None)
@given(hosts(), MODEL, WISH, st.integers(0, 2**40))
def test_more_memory_never_turns_fits_into_does_not_fit(
    host: Host, model: Any, wish: Any, more: int
) -> None:
    total = host.memory.total_bytes
    if total is None:
        return
    before = plan(host, model, wish)
    larger = msgspec.structs.replace(host.memory, total_bytes=total + more)
    after = plan(msgspec.structs.replace(host, memory=larger), model, wish)
    if before.verdict.fits:
        assert after.verdict.fits


# The same of every shipped profile, on machines with GPUs and other stacks


@st.composite
def cards(draw: st.DrawFn) -> Gpu:
    """A GPU of which some facts may be missing."""
    card = msgspec.structs.replace(
        CARD, memory_bytes=draw(st.none() | st.integers(1, 4 * 192).map(lambda n: n * GIB // 4))
    )
    for field in ("name", "bandwidth_bytes_s", "numa_node", "compute_capability"):
        if draw(st.integers(0, 5)) == 0:
            card = msgspec.structs.replace(card, **{field: None})
    return card


@st.composite
def gpu_hosts(draw: st.DrawFn) -> Host:
    found = draw(st.lists(cards(), max_size=3))
    gpus = tuple(msgspec.structs.replace(card, index=n) for n, card in enumerate(found))
    host = msgspec.structs.replace(draw(hosts()), gpus=gpus)
    peak = draw(st.none() | st.floats(1e9, 2e12))
    memory = msgspec.structs.replace(host.memory, bandwidth_bytes_s=Bandwidth(theoretical=peak))
    isa = draw(st.sampled_from([(), ("avx2",), ("avx512_vnni", "avx2"), ("asimd",)]))
    return msgspec.structs.replace(
        host, memory=memory, cpu=msgspec.structs.replace(host.cpu, isa=isa)
    )


@st.composite
def wishes(draw: st.DrawFn) -> tuple[Profile, Model]:
    """A shipped profile with some keys changed, and a model that its engine runs."""
    wish = shipped(draw(st.sampled_from(SHIPPED)))
    model = shipped_model(wish)
    kinds = ["fp8", "auto"] if wish.engine == "vllm" else ["f16", "q8_0", "q4_0"]
    changes: dict[str, Any] = {
        "context": st.sampled_from([None, "auto", 256, 8192, 32768, 200_000]),
        "concurrency": st.sampled_from([None, "auto", 1, 4, 64]),
        "kv_type": st.sampled_from([None, *kinds]),
        "gpu_reserve_bytes": st.integers(0, 16).map(lambda n: n * GIB),
    }
    kept = {name: draw(values) for name, values in changes.items() if draw(st.booleans())}
    return profile(wish, **kept), model


CLAIMS = st.lists(
    st.builds(
        Claim,
        stack=st.sampled_from(["x", "y"]),
        cpus=st.sampled_from(["", "0", "0-3", "1,3,5"]).map(CpuList.parse),
        memory_bytes=st.integers(0, 64).map(lambda n: n * GIB),
        gpus=st.sampled_from([(), (GpuShare(index=0, bytes=20 * GIB),)]),
        port=st.none() | st.integers(8000, 8100),
    ),
    max_size=2,
).map(tuple)


def planned(host: Host, wish: Profile, model: Model, claims: tuple[Claim, ...] = ()) -> Plan | None:
    """The plan, or None where the machine cannot run it; nothing else may go wrong."""
    try:
        return plan(host, model, wish, claims=claims)
    except StackctlError as error:
        assert error.exit_code in (ExitCode.HOST, ExitCode.REFUSED), error.message
        return None


@settings(max_examples=150, deadline=None)
@given(gpu_hosts(), wishes(), CLAIMS)
def test_no_plan_exceeds_the_machine(
    host: Host, wanted: tuple[Profile, Model], claims: tuple[Claim, ...]
) -> None:
    wish, model = wanted
    made = planned(host, wish, model, claims)
    if made is None:
        return
    value = decided(made)
    allowed = set(host.cpu.allowed or ())
    cpus = set(made.placement.cpus or ())
    assert cpus <= allowed
    # Cores are shared only where none is left, and then the plan says with whom.
    taken_cpus = {cpu for claim in claims for cpu in claim.cpus}
    overlap = {c.stack for c in claims if set(c.cpus) & cpus}
    assert overlap <= set(made.placement.shared_with)
    if overlap:
        cores = [set(core) for core in host.cpu.siblings]
        # Where siblings are unknown, as many CPUs as there are cores are taken for cores.
        usable = cores or [{cpu} for cpu in sorted(allowed)[: host.cpu.cores]]
        # A core is taken as well where only its other CPU is claimed.
        assert not [core for core in usable if core & allowed and not core & taken_cpus]
    for name in ("threads", "threads-batch"):
        if value.get(name) is not None:
            assert 1 <= value[name] <= len(cpus)
    for budget in (made.memory, made.host_memory):
        if budget is None:
            continue
        parts = (budget.weights_bytes, budget.kv_bytes, budget.compute_bytes)
        assert min(parts) >= 0
        assert budget.total_bytes == sum(parts)
        if made.verdict.fits and budget.limit_bytes is not None:
            assert budget.total_bytes <= budget.limit_bytes
    main = made.host_memory or made.memory
    if made.verdict.fits and host.memory.total_bytes is not None:
        taken = sum(claim.memory_bytes for claim in claims)
        assert main.total_bytes + taken <= host.memory.total_bytes
    if made.verdict.fits and made.placement.gpus:
        for gpu in host.gpus:
            if str(gpu.index) in made.placement.gpus and gpu.memory_bytes is not None:
                others = sum(s.bytes for c in claims for s in c.gpus if s.index == gpu.index)
                free = gpu.memory_bytes - wish.gpu_reserve_bytes - others
                assert made.memory.total_bytes <= free
    assert all(d.reason.strip() and "\n" not in d.reason for d in made.decisions)
    assert from_json(to_json(made), Plan, where="test") == made
    if made.verdict.fits is False:
        assert made.verdict.viable is False
    for pair in (made.prediction.decode_tok_s, made.prediction.prefill_tok_s):
        assert pair is None or 0 < pair[0] <= pair[1]


@settings(max_examples=60, deadline=None)
@given(gpu_hosts(), wishes(), st.integers(0, 2**38), st.integers(0, 2**38))
def test_more_memory_of_any_kind_never_turns_fits_into_does_not_fit(
    host: Host, wanted: tuple[Profile, Model], ram: int, vram: int
) -> None:
    wish, model = wanted
    before = planned(host, wish, model)
    gpus = tuple(
        msgspec.structs.replace(gpu, memory_bytes=gpu.memory_bytes and gpu.memory_bytes + vram)
        for gpu in host.gpus
    )
    total = host.memory.total_bytes
    memory = msgspec.structs.replace(host.memory, total_bytes=total and total + ram)
    after = planned(msgspec.structs.replace(host, gpus=gpus, memory=memory), wish, model)
    assert (before is None) == (after is None)
    if before is not None and after is not None and before.verdict.fits:
        assert after.verdict.fits


@settings(max_examples=60, deadline=None)
@given(gpu_hosts(), wishes(), st.sampled_from(["context", "concurrency"]))
def test_auto_is_the_most_that_fits(host: Host, wanted: tuple[Profile, Model], field: str) -> None:
    wish, model = wanted
    other = "concurrency" if field == "context" else "context"
    # One thing at a time: the other one is given.
    wish = profile(wish, **{field: "auto", other: 1 if other == "concurrency" else 2048})
    made = planned(host, wish, model)
    if made is None or made.verdict.fits is None:
        return
    vllm = wish.engine == "vllm"
    name = {"context": "max-model-len" if vllm else "ctx-size",
            "concurrency": "max-num-seqs" if vllm else "parallel"}[field]  # fmt: skip
    found = int(values_of(made, name)[0])
    step = 256 if field == "context" else 1
    least = planned(host, profile(wish, **{field: step}), model)
    assert least is not None
    # Whenever anything fits, so does what was found.
    assert made.verdict.fits is least.verdict.fits
    if not made.verdict.fits:
        return
    same = planned(host, profile(wish, **{field: found}), model)
    assert same is not None
    assert same.verdict.fits
    most = (model.context or 131072) if field == "context" else 256
    if found + step <= most:
        more = planned(host, profile(wish, **{field: found + step}), model)
        assert more is not None
        if vllm and field == "concurrency" and (gpus := len(made.placement.gpus)):
            # vLLM takes more and lets them wait; the cache holds no more whole contexts.
            token = kv_token_bytes(model, wish.kv_type or "auto", gpus)
            length = int(values_of(made, "max-model-len")[0])
            assert found <= made.memory.kv_bytes * gpus / (token * length) < found + 1
        else:
            assert more.verdict.fits is False
    assert "auto: the most that fits" in reason(made, name)


def test_auto_on_a_cpu_is_the_most_whose_cache_fits() -> None:
    wish = profile(shipped("cpu-vllm"), context=32768, concurrency="auto")
    memory = Memory(total_bytes=16 * GIB)
    host = msgspec.structs.replace(EPYC_GPU, gpus=(), memory=memory)
    made = plan(host, GEMMA, wish)
    (count,) = values_of(made, "max-num-seqs")
    more = plan(host, GEMMA, profile(wish, concurrency=int(count) + 1))
    assert (made.verdict.fits, more.verdict.fits) == (True, False)
    cache = made.memory.kv_bytes / kv_token_bytes(made.model)
    assert int(count) * 32768 <= cache


def test_auto_for_both_gives_every_request_its_context() -> None:
    wish = profile(shipped("gpu-nvfp4"), context="auto", concurrency="auto")
    made = plan(EPYC_GPU, shipped_model(wish), wish)
    count, length = (int(values_of(made, name)[0]) for name in ("max-num-seqs", "max-model-len"))
    assert count == 24
    cache = made.memory.kv_bytes / kv_token_bytes(made.model)
    assert count * length <= cache < count * (length + 256)


@pytest.mark.parametrize("name", ["gpu-nvfp4", "cpu-throughput"])
def test_auto_without_a_known_memory_is_a_usual_value(name: str) -> None:
    wish = profile(shipped(name), context="auto", concurrency="auto")
    card = msgspec.structs.replace(CARD, memory_bytes=None)
    host = msgspec.structs.replace(EPYC_GPU, gpus=(card,), memory=Memory())
    made = plan(host, shipped_model(wish), wish)
    assert made.verdict.fits is None
    vllm = wish.engine == "vllm"
    (context,) = values_of(made, "max-model-len" if vllm else "ctx-size")
    (count,) = values_of(made, "max-num-seqs" if vllm else "parallel")
    assert (int(context), int(count)) == ((32768, 1) if vllm else (32768, 4))
    assert "memory unknown" in reason(made, "max-num-seqs" if vllm else "parallel")


@settings(max_examples=60, deadline=None)
@given(wishes(), st.data())
def test_any_fact_may_be_missing(wanted: tuple[Profile, Model], data: st.DataObject) -> None:
    """Every optional fact of machine and model left out, one draw at a time."""
    wish, model = wanted
    host = EPYC_GPU

    def without(value: Any, *required: str) -> Any:
        optional = [f for f in msgspec.structs.fields(value) if not f.required]
        gone = {
            f.name: f.default for f in optional
            if f.name not in required and f.default is not msgspec.NODEFAULT
            and data.draw(st.integers(0, 3)) == 0
        }  # fmt: skip
        return msgspec.structs.replace(value, **gone)

    poor = msgspec.structs.replace(
        host,
        cpu=without(host.cpu),
        memory=without(host.memory),
        gpus=tuple(without(gpu) for gpu in host.gpus),
        tools=without(host.tools),
        limits=without(host.limits),
    )
    bare = without(model, "format", "schema", "unsupported", "passes")
    made = planned(poor, wish, bare)
    if made is not None:
        assert from_json(to_json(made), Plan, where="test") == made
        if poor.memory.total_bytes is None and made.verdict.fits is not False:
            assert made.verdict.fits is None
