"""Several stacks on one machine: what each claims, and that none takes another's share."""

from __future__ import annotations

import json
import os
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
    MIB,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.plan import claimed_resources
from stackctl.plan.claimed_resources import claim_of
from stackctl.plan.planner import PlanInputs, claims_note, make_plan_ignoring_user_claims
from stackctl.state.claims import enforceable_claims, installed_claims
from stackctl.state.paths import scope_paths
from stackctl.units.render import UnitTarget, render_units
from stackctl.values.base import from_json, to_json, to_plain
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Host
from stackctl.values.plan import Claim, GpuShare, Plan


def stack(name: str, host: Host = EPYC_GPU, *claims: Claim, **changes: Any) -> Plan:
    wish = profile(shipped(name), **changes)
    return plan(host, shipped_model(wish), wish, claims=claims)


def cores_of(host: Host, cpus: CpuList) -> set[CpuList]:
    """The physical cores that a CPU list touches."""
    return {core for core in host.cpu.siblings if cpus & core}


def test_what_a_plan_claims() -> None:
    on_gpu = claim_of(stack("gpu-nvfp4"))
    made = stack("gpu-nvfp4")
    assert made.host_memory is not None
    assert on_gpu == Claim(
        stack="gpu-nvfp4",
        cpus=CpuList.parse("14-15"),
        memory_bytes=made.host_memory.total_bytes,
        gpus=(GpuShare(index=0, bytes=made.memory.total_bytes),),
        port=8000,
    )
    on_cpu = claim_of(stack("cpu-moe-batch"))
    assert (on_cpu.cpus, on_cpu.gpus, on_cpu.port) == (CpuList.parse("0-13"), (), 8082)
    assert on_cpu.memory_bytes > 138 * 10**9
    assert from_json(to_json(on_cpu), Claim, where="test") == on_cpu


def test_sums() -> None:
    claims = (
        Claim(
            stack="a",
            cpus=CpuList.parse("0-3"),
            memory_bytes=5,
            gpus=(GpuShare(index=0, bytes=7),),
            port=1,
        ),
        Claim(
            stack="b",
            cpus=CpuList.parse("8"),
            memory_bytes=6,
            gpus=(GpuShare(index=1, bytes=9),),
            port=2,
        ),
        Claim(stack="c"),
    )
    assert claimed_resources.claimed_cpus(claims) == {0, 1, 2, 3, 8}
    assert claimed_resources.claimed_memory(claims) == 11
    assert claimed_resources.claimed_gpu_bytes(claims, 0) == 7
    assert claimed_resources.claimed_gpu_bytes(claims, 2) == 0
    assert claimed_resources.port_owner(claims, 2) == "b"
    assert claimed_resources.port_owner(claims, 3) is None
    assert claimed_resources.other_claims(claims, "b") == (claims[0], claims[2])


def test_a_stack_does_not_stand_in_its_own_way() -> None:
    alone = stack("gpu-nvfp4")
    again = stack("gpu-nvfp4", EPYC_GPU, claim_of(alone))
    assert again == alone
    # Nor does the other objective under the same name.
    assert stack("gpu-nvfp4", EPYC_GPU, claim_of(alone), objective="throughput").verdict.fits


def test_two_stacks_on_one_gpu_do_not_fit_and_say_why() -> None:
    made = stack("gpu-reasoning", EPYC_GPU, claim_of(stack("gpu-nvfp4")))
    assert made.verdict.fits is False
    assert any("for other stacks" in text for text in made.verdict.reasons)
    # A small share leaves room, and the utilisation follows.
    share = Claim(stack="x", gpus=(GpuShare(index=0, bytes=20 * GIB),))
    made = stack("gpu-nvfp4", EPYC_GPU, share)
    assert made.verdict.fits is True
    used = made.memory.total_bytes
    assert CARD.memory_bytes is not None
    assert used <= CARD.memory_bytes - 24 * GIB
    reasons = {d.field: d.reason for d in made.decisions}
    assert "20 GiB left to other stacks" in reasons["gpu-memory-utilization"]


def test_a_cpu_stack_takes_the_cores_that_are_left() -> None:
    first = plan(EPYC, IQUEST, profile(LATENCY, stack="first"))
    second = plan(
        EPYC, GEMMA, profile(LATENCY, stack="second", port=9000), claims=(claim_of(first),)
    )
    assert (first.placement.cpus, second.placement.cpus) == (
        CpuList.parse("0-13"),
        CpuList.parse("14-15"),
    )


def test_cores_that_are_all_claimed_are_shared_and_the_plan_says_so() -> None:
    alone, claim = plan(EPYC, GEMMA, LATENCY), Claim(stack="x", cpus=CpuList.parse("0-15"))
    made = plan(EPYC, GEMMA, LATENCY, claims=(claim,))
    assert made.argv == alone.argv
    assert (made.placement.cpus, made.placement.shared_with) == (alone.placement.cpus, ("x",))
    (why,) = (d.reason for d in made.decisions if d.field == "cpus")
    assert "shared with x: both slow down while both work" in why
    assert "cores shared with x: both slow down while both work" in made.verdict.reasons
    assert (made.verdict.fits, made.verdict.viable) == (alone.verdict.fits, alone.verdict.viable)
    # Only those are named whose cores are used.
    halves = (
        Claim(stack="a", cpus=CpuList.parse("0-7")),
        Claim(stack="b", cpus=CpuList.parse("8-15")),
        Claim(stack="c"),
    )
    made = plan(EPYC, GEMMA, LATENCY, claims=halves)
    assert made.placement.shared_with == ("a", "b")
    named = plan(EPYC, GEMMA, profile(LATENCY, placement={"cpus": "0-3"}), claims=halves)
    assert (named.placement.cpus, named.placement.shared_with) == (CpuList.parse("0-3"), ("a",))
    # Nothing is shared where cores are left.
    assert plan(EPYC, GEMMA, LATENCY, claims=halves[:1]).placement.shared_with == ()


def test_a_stack_that_shares_plans_the_same_again() -> None:
    first = plan(HOSTS["lab"], GEMMA, profile(LATENCY, stack="first"))
    wish = profile(LATENCY, stack="second", port=9000)
    second = plan(HOSTS["lab"], GEMMA, wish, claims=(claim_of(first),))
    both = (claim_of(first), claim_of(second))
    again = plan(HOSTS["lab"], GEMMA, profile(LATENCY, stack="first"), claims=both)
    assert (again.argv, again.placement.cpus) == (first.argv, first.placement.cpus)
    assert plan(HOSTS["lab"], GEMMA, wish, claims=both) == second


def test_memory_bound_to_another_node_is_not_taken_from_this_one() -> None:
    host = HOSTS["dual-nps4"]
    first = plan(host, IQUEST, profile(LATENCY, stack="first", placement={"nodes": "0"}))
    claim = claim_of(first)
    assert claim.mems == CpuList.parse("0")
    wish = profile(LATENCY, stack="second", port=9000, placement={"nodes": "1"})
    alone, beside = plan(host, IQUEST, wish), plan(host, IQUEST, wish, claims=(claim,))
    assert beside.memory.limit_bytes == alone.memory.limit_bytes
    # On the same node it is, and what is not bound may be anywhere.
    same = plan(
        host, IQUEST, profile(LATENCY, stack="s", placement={"nodes": "0"}), claims=(claim,)
    )
    assert (same.memory.limit_bytes or 0) == (first.memory.limit_bytes or 0) - claim.memory_bytes
    loose = Claim(stack="x", memory_bytes=10 * GIB)
    anywhere = plan(host, IQUEST, wish, claims=(loose,))
    assert (anywhere.memory.limit_bytes or 0) == (alone.memory.limit_bytes or 0) - 10 * GIB
    assert claim_of(plan(host, IQUEST)).mems == CpuList()


def test_a_port_that_another_stack_claims_is_told() -> None:
    claim = Claim(stack="x", port=8080)
    made = plan(EPYC, GEMMA, LATENCY, claims=(claim,))
    assert "port 8080 belongs to x: another one by --set port=N" in made.verdict.reasons
    other = plan(EPYC, GEMMA, profile(LATENCY, port=8081), claims=(claim,))
    assert not any("port" in text for text in other.verdict.reasons)
    # One's own claim is no other's.
    assert plan(EPYC, GEMMA, LATENCY, claims=(Claim(stack="cpu", port=8080),)) == plan(
        EPYC, GEMMA, LATENCY
    )


def test_a_core_is_claimed_with_its_sibling() -> None:
    host = HOSTS["epyc-smt"]
    claim = Claim(stack="x", cpus=CpuList.parse("16-19"))
    made = plan(host, GEMMA, LATENCY, claims=(claim,))
    assert not set(made.placement.cpus or ()) & set(range(4))
    # Also where this process may not use the sibling itself.
    some = msgspec.structs.replace(
        host, cpu=msgspec.structs.replace(host.cpu, allowed=CpuList(range(16)))
    )
    assert plan(some, GEMMA, LATENCY, claims=(claim,)).placement.cpus == CpuList.parse("4-15")
    assert not cores_of(host, made.placement.cpus or CpuList()) & cores_of(host, claim.cpus)


def test_memory_of_others_is_not_there() -> None:
    claim = Claim(stack="x", memory_bytes=740 * GIB)
    made = plan(EPYC, IQUEST, LATENCY, claims=(claim,))
    assert made.verdict.fits is False
    assert "740 GiB for other stacks" in made.verdict.reasons[0]


def test_claims_that_do_not_bind_are_passed_over_where_they_alone_stand_in_the_way() -> None:
    def past(*theirs: Claim, own: tuple[Claim, ...] = ()) -> tuple[Plan, str | None]:
        known = PlanInputs(image="i", image_reason="x", claims=(*own, *theirs))
        made, used = make_plan_ignoring_user_claims(
            host=EPYC, model=GEMMA, profile=LATENCY, inputs=known, binding=own
        )
        return made, claims_note("cpu", known, used)

    free, said = past()
    assert (free.verdict.fits, said) == (True, None)
    huge = Claim(stack="theirs", cpus=CpuList.parse("0-3"), memory_bytes=2**60)
    made, said = past(huge)
    assert made == free
    assert said is not None
    assert "theirs" in said
    many = [Claim(stack=f"s{number}", memory_bytes=2**50) for number in range(9)]
    assert "s0, s1, s2 and 6 more" in (past(*many)[1] or "")
    # What fits beside them leaves them their share.
    small = Claim(stack="theirs", cpus=CpuList.parse("0-3"), memory_bytes=GIB)
    made, said = past(small)
    assert not set(made.placement.cpus or ()) & set(range(4))
    assert said is None
    # A copy of one's own claim in somebody's home does not take that away.
    own = Claim(stack="own", memory_bytes=2**60)
    made, said = past(own, own=(own,))
    assert (made.verdict.fits, said) == (False, None)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["epyc-smt", "epyc-gpu", "dual-nps4", "epyc-l3numa"]),
    st.lists(
        st.tuples(st.integers(0, 191), st.integers(1, 40), st.integers(0, 400), st.integers(0, 96)),
        max_size=3,
    ),
    st.sampled_from(["cpu-small", "cpu-moe-batch", "gpu-nvfp4", "hybrid-moe", "gpu-gguf"]),
)
def test_plans_never_take_what_others_claim(
    name: str, parts: list[tuple[int, int, int, int]], wish: str
) -> None:
    host = HOSTS[name]
    threads = host.cpu.threads or 1
    claims = tuple(
        Claim(
            stack=f"other-{number}",
            cpus=CpuList((first + k) % threads for k in range(count)),
            memory_bytes=memory * GIB,
            gpus=(GpuShare(index=0, bytes=gpu * GIB),),
        )
        for number, (first, count, memory, gpu) in enumerate(parts)
    )
    try:
        made = stack(wish, host, *claims)
    except StackctlError as error:
        assert error.exit_code in (ExitCode.REFUSED, ExitCode.HOST)
        return
    mine = cores_of(host, made.placement.cpus or CpuList())
    taken_cores = {core for claim in claims for core in cores_of(host, claim.cpus)}
    if mine & taken_cores:
        # Shared only where none is left, and told.
        assert taken_cores == set(host.cpu.siblings)
        sharers = [c.stack for c in claims if mine & cores_of(host, c.cpus)]
        assert list(made.placement.shared_with) == sharers
    if made.verdict.fits:
        total = host.memory.total_bytes or 0
        main = made.host_memory or made.memory
        assert main.total_bytes + claimed_resources.claimed_memory(claims) <= total
        if made.placement.gpus:
            taken = made.memory.total_bytes + claimed_resources.claimed_gpu_bytes(claims, 0)
            assert taken <= (CARD.memory_bytes or 0) - shipped(wish).gpu_reserve_bytes


# Claims read from units


def unit(made: Plan, claim: Claim) -> str:
    target = UnitTarget(scope="system", podman="5.4.2", image="i", program=(), claim=claim)
    # The CPU plan's unit, with the claim of either: units for GPUs are not rendered yet.
    return (
        render_units(stack("cpu-moe-batch") if made.placement.gpus else made, target, 3)
        .files[0]
        .text
    )


def put(root: Path, folder: str, name: str, text: str) -> None:
    path = root / folder.lstrip("/") / name / f"{name}.container"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


SYSTEM = "/etc/containers/systemd/stackctl"
USER = "/home/ann/.config/containers/systemd/stackctl"


def test_claims_are_read_from_the_units_of_every_scope(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    first, second = stack("cpu-moe-batch"), stack("gpu-nvfp4")
    put(tmp_path, SYSTEM, first.stack, unit(first, claim_of(first)))
    put(tmp_path, USER, second.stack, unit(second, claim_of(second)))
    found = installed_claims(RecordedMachine(tmp_path), scope_paths("system", {}))
    assert found == (claim_of(first), claim_of(second))
    # What an ordinary user claims keeps root from nothing.
    kept = enforceable_claims(RecordedMachine(tmp_path), scope_paths("system", {}))
    assert kept == (found[:1] if os.geteuid() == 0 else found)
    # And a plan of the one leaves the other its share.
    again = plan(EPYC_GPU, first.model, shipped("cpu-moe-batch"), claims=found)
    assert again.placement.cpus == CpuList.parse("0-13")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Claim=",
        "Claim={",
        "Claim=[]",
        "Claim=null",
        'Claim={"stack": 5}',
        'Claim={"stack": "x", "cores": 4}',
        'Claim={"stack": "x", "gpus": [{"index": "0"}]}',
        "Claim=" + "[" * 100_000,
        'Claim={"stack": "x", "cpus": "zebra"}',
        'Claim={"stack": "x", "cpus": "5-"}',
        'Claim={"stack": "x", "cpus": "0-99999999999"}',
        'Claim={"stack": "x", "memory_bytes": -5}',
        'Claim={"stack": "x", "gpus": [{"index": 0, "bytes": -1}]}',
    ],
)
def test_a_damaged_claim_counts_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    put(tmp_path, SYSTEM, "odd", f"[X-Stackctl]\n{line}\n[Service]\n")
    good = claim_of(stack("cpu-small"))
    put(tmp_path, SYSTEM, "good", f"[X-Stackctl]\nClaim={json.dumps(to_plain(good))}\n")
    assert installed_claims(RecordedMachine(tmp_path), scope_paths("system", {})) == (good,)


def test_a_pipe_in_the_place_of_a_unit_is_not_waited_for(tmp_path: Path) -> None:
    """Anybody may put one into their own home, which root's plans look into."""
    folder = tmp_path / USER.lstrip("/") / "x"
    folder.mkdir(parents=True)
    (tmp_path / "sys").mkdir()
    os.mkfifo(folder / "x.container")
    assert installed_claims(RecordedMachine(tmp_path), scope_paths("system", {})) == ()
    assert Machine().read(str(folder / "x.container")) == ""


def test_a_unit_survives_a_name_that_needs_escaping() -> None:
    made = stack("cpu-small")
    claim = msgspec.structs.replace(claim_of(made), memory_bytes=3 * MIB)
    text = unit(made, claim)
    (line,) = [text for text in text.splitlines() if text.startswith("Claim=")]
    assert from_json(line.removeprefix("Claim="), Claim, where="unit") == claim
