"""Comparison of memory with the plan: policy, nodes, locked memory, and resident memory."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping

from stackctl.diagnose.verify_results import fail, info, ok, redeploy_command, skip_missing
from stackctl.engines import engine as find_engine
from stackctl.quantity import format_bytes
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import Generation
from stackctl.values.host import UNLIMITED
from stackctl.values.inspection import Inspection, PageKind
from stackctl.values.result import Result

_MIB = 2**20
#: At least this share of bound memory lies on its nodes; the kernel keeps a little elsewhere.
_BOUND = 0.95
#: Of interleaved memory no node holds more than _UNEVEN times its share plus _LITTLE.
_UNEVEN, _LITTLE = 1.25, 0.02
#: Less memory than this cannot be spread evenly, because huge pages are placed whole.
_LEAST_SPREAD = 64 * _MIB
#: A model counts as locked from this share on: its header is not locked.
_LOCKED = 0.95
#: Memory up to this much over the budget is accepted: page tables and thread stacks are not
#: planned.
_OVER, _OVER_BYTES = 1.05, 32 * _MIB


def verify_memory(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Compare policy, placement, locked memory, size and huge pages with the plan."""
    yield _policy(generation, inspection)
    yield _memory(generation, inspection)
    yield from _locked(generation, inspection)
    yield _resident(generation, inspection)
    yield _hugepages(inspection)


def _sums(inspection: Inspection, *kinds: PageKind) -> dict[int, int]:
    """Return the bytes of some kinds of pages on each node."""
    found: dict[int, int] = defaultdict(int)
    for process in inspection.processes:
        for pages in process.pages:
            if pages.kind in kinds:
                for held in pages.nodes:
                    found[held.node] += held.bytes
    return dict(found)


def dominant_policy(inspection: Inspection) -> str | None:
    """Return the policy of most of the engine's own memory; None if unknown."""
    found: dict[str, int] = defaultdict(int)
    for process in inspection.processes:
        for pages in process.pages:
            if pages.kind in ("anonymous", "shared"):
                found[pages.policy] += sum(held.bytes for held in pages.nodes)
    return max(found, key=lambda text: found[text]) if found else None


def _policy(generation: Generation, inspection: Inspection) -> Result:
    placement = generation.plan.placement
    nodes = placement.mems or CpuList()
    planned = placement.policy if placement.policy == "default" else f"{placement.policy}:{nodes}"
    actual = dominant_policy(inspection)
    if actual is None:
        return skip_missing(inspection, "policy", planned, "numa")
    # In "interleave=static:0-1" the flag sets the effect of a changed cpuset on the nodes.
    name, _, have = actual.partition(":")
    name = name.partition("=")[0]
    if placement.policy == "default":
        by_itself = "" if name == "default" else ", set by the engine itself"
        return (info if by_itself else ok)("policy", planned, f"{actual}{by_itself}")
    # The kernel writes "prefer" for preferred.
    if name == placement.policy.removesuffix("red") and have and CpuList.parse(have) == nodes:
        return ok("policy", planned, actual)
    if placement.policy == "bind" and inspection.mems and inspection.mems == nodes:
        return ok("policy", planned, f"{actual}, within nodes {inspection.mems} by the cpuset")
    return fail(
        "policy",
        planned,
        actual,
        inspection.first_drift
        or "the engine did not inherit the unit's NUMAPolicy=, or set another one itself",
        redeploy_command(generation),
    )


def _memory(generation: Generation, inspection: Inspection) -> Result:
    """Compare the nodes of the pages with the plan: the model's, and the engine's own."""
    placement = generation.plan.placement
    model, own = _sums(inspection, "model"), _sums(inspection, "anonymous", "shared")
    total = {node: model.get(node, 0) + own.get(node, 0) for node in {*model, *own}}
    nodes = placement.mems or CpuList()
    if not sum(total.values()):
        return skip_missing(inspection, "memory", None, "numa")
    actual = _where(total)
    evidence = f"model: {_where(model)}; its own: {_where(own)}" if len(total) > 1 else None
    if not nodes:
        return info("memory", None, actual, evidence)
    if placement.policy == "preferred":
        return info("memory", f"on node {placement.mems}, as it has room", actual, evidence)
    if len(nodes) == 1 or placement.policy == "bind":
        expected = f"on node{'s' if len(nodes) > 1 else ''} {nodes}"
        wrong = [part for part in (own, model) if _share(part, nodes) < _BOUND]
    elif placement.policy == "interleave":
        expected = f"spread evenly over nodes {nodes}"
        wrong = [part for part in (own, model) if not _even(part, len(nodes))]
    else:
        return info("memory", "left to the kernel", actual, evidence)
    if not wrong:
        return ok("memory", expected, actual, evidence)
    if own in wrong:
        cause = "the memory policy that was planned is not in effect"
        told = f"{cause}; {evidence or actual}"
        return fail("memory", expected, actual, told, redeploy_command(generation))
    files = [file.path for file in generation.plan.model.files]
    drop = (
        f"dd {shlex.quote(f'if={files[0]}')} iflag=nocache count=0"
        if len(files) == 1
        else ("echo 1 | sudo tee /proc/sys/vm/drop_caches")
    )
    return fail(
        "memory",
        expected,
        actual,
        f"{evidence}. The model's pages were in the page cache already, placed by an earlier run "
        "or a copy, and stay where they are",
        f"stackctl down {generation.stack}; {drop}; {redeploy_command(generation)}",
    )


def _where(held: Mapping[int, int]) -> str:
    """Return the distribution as text, such as ``node 0 holds 100 % of 7.3 GiB``.

    List up to 4 nodes; for more, give the lowest and the highest share.
    """
    total = sum(held.values())
    if not total:
        return "nothing"
    shares = {node: round(100 * held[node] / total) for node in sorted(held) if held[node]}
    size = format_bytes(total)
    if len(shares) == 1:
        return f"node {next(iter(shares))} holds 100 % of {size}"
    if len(shares) <= 4:
        each = ", ".join(f"node {node} {share} %" for node, share in shares.items())
        return f"{each} of {size}"
    least, most = min(shares.values()), max(shares.values())
    return f"{len(shares)} nodes hold {least}-{most} % of {size} each"


def _share(held: Mapping[int, int], nodes: CpuList) -> float:
    total = sum(held.values())
    return sum(held.get(node, 0) for node in nodes) / total if total else 1.0


def _even(held: Mapping[int, int], count: int) -> bool:
    total = sum(held.values())
    if total < _LEAST_SPREAD:
        return True
    return max(held.values()) / total <= _UNEVEN / count + _LITTLE


def _locked(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    plan, stack = generation.plan, generation.stack
    known = [p.locked_bytes for p in inspection.processes if p.locked_bytes is not None]
    locked = sum(known)
    if not find_engine(plan.engine).locks_model(plan.argv):
        if not known:
            return
        reason = next((d.reason for d in plan.decisions if d.field == "load-mode"), None)
        yield info("locked", None, f"{format_bytes(locked)}, {reason or 'none planned'}")
        return
    need = plan.model.weights_bytes
    expected = f"{format_bytes(need)}, the whole model"
    if not known:
        yield skip_missing(inspection, "locked", expected)
        return
    actual = f"{format_bytes(locked)} of {format_bytes(need)}"
    if locked >= _LOCKED * need:
        yield ok("locked", expected, actual)
        return
    said = next((fact.value for fact in inspection.log if fact.name == "mlock"), None)
    limit = inspection.memlock_bytes
    cause = f"{plan.engine}: {said}" if said else None
    remedy = f"stackctl logs {stack} tells why"
    if limit is not None and limit != UNLIMITED and limit < need:
        limited = f"the limit of its process is {format_bytes(limit)}"
        cause = f"{cause}; {limited}" if cause else limited
        remedy = f"stackctl provision --only memlock; then stackctl restart {stack}"
    yield fail("locked", expected, actual, cause, remedy)


def _resident(generation: Generation, inspection: Inspection) -> Result:
    plan = generation.plan
    budget = plan.host_memory if plan.placement.gpus and plan.host_memory else plan.memory
    expected = f"{format_bytes(budget.total_bytes)} at most"
    known = [(p, p.own_bytes, p.file_bytes) for p in inspection.processes]
    sizes = [(p, own, files) for p, own, files in known if own is not None and files is not None]
    if not sizes or len(sizes) < len(known):
        return skip_missing(inspection, "resident", expected, "memory")
    # Processes of one engine map the same files, so the largest mapping counts once. It counts in
    # full even if processes of other stacks share its pages.
    mapped = max(files for _, _, files in sizes)
    if plan.placement.gpus:
        # Weights that were copied to the GPU are only page cache; the others stay in main memory.
        model = min(mapped, sum(_sums(inspection, "model").values()))
        mapped += min(model, budget.weights_bytes) - model
    total = sum(own for _, own, _ in sizes) + mapped
    actual = f"{format_bytes(total)} of {format_bytes(budget.total_bytes)} planned"
    parts = "; ".join(
        f"{p.command} (process {p.id}): {format_bytes(own)} and {format_bytes(files)} of files"
        for p, own, files in sizes
    )
    if total <= budget.total_bytes * _OVER + _OVER_BYTES:
        return ok("resident", expected, actual, parts)
    return fail(
        "resident",
        expected,
        actual,
        f"{parts}. Plans of other stacks count on the smaller number",
        "a smaller context, or a smaller cache: --set engine_args.cache-ram=MIB",
    )


def _hugepages(inspection: Inspection) -> Result:
    known = [p.huge_bytes for p in inspection.processes if p.huge_bytes is not None]
    if not known:
        return skip_missing(inspection, "hugepages", None)
    choice = f"; transparent huge pages: {inspection.hugepages}" if inspection.hugepages else ""
    return info("hugepages", None, f"{format_bytes(sum(known))}{choice}")
