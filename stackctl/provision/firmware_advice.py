"""Settings that only the firmware can change: their present values and the effect of others.

Source: AMD's tuning guides for EPYC 9004 and 9005. stackctl never changes these settings.
"""

from __future__ import annotations

from stackctl.values.host import Host
from stackctl.values.result import Result


def firmware_advice(host: Host) -> tuple[Result, ...]:
    """Return advice for EPYC servers; empty for other machines."""
    nodes, sockets, l3 = len(host.cpu.numa), host.cpu.sockets, len(host.cpu.l3)
    if "EPYC" not in (host.cpu.model or "") or not sockets or l3 < 2:
        # An EPYC with a single L3 is a virtual machine, whose firmware is not the server's.
        return ()
    as_numa = nodes == l3 and nodes > 4 * sockets
    found = [_advice(
        "bios-l3-as-numa", "on" if as_numa else "off",
        "on: each L3 is a node, which shows the kernel where caches are, and helps small "
        "models and experts that fit one; a dense model larger than a cache gains nothing, and "
        "must be interleaved over all nodes",
    )]  # fmt: skip
    if not as_numa and nodes and nodes % sockets == 0:
        found.append(_advice(
            "bios-nps", f"NPS{nodes // sockets}",
            "NPS1: one node a socket, every core uses all memory channels; right for one "
            "large model. NPS2 and NPS4: as many nodes with their own channels each; for several "
            "stacks that must not disturb each other, each with that part of the bandwidth",
        ))  # fmt: skip
    if host.cpu.smt is not None:
        found.append(_advice(
            "bios-smt", "on" if host.cpu.smt else "off",
            "generation is limited by memory and gains nothing from two threads a core; "
            "stackctl uses one thread a core either way; off makes neighbours quieter",
        ))  # fmt: skip
    found.append(_advice(
        "bios-determinism", "not visible from here",
        "power: each part as fast as its own power limit lets it; performance: all parts "
        "equally fast, so that measurements of two machines compare",
    ))  # fmt: skip
    return tuple(found)


def _advice(name: str, now: str, effect: str) -> Result:
    return Result(name=name, status="info", actual=now, evidence=effect)
