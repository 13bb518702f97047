"""Settings that only the firmware can change: their present values and the effect of others.

Source: AMD's tuning guides for EPYC 9004 and 9005. stackctl never changes these settings.
"""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.values.host import Host
from stackctl.values.result import Result


def firmware_advice(host: Host) -> tuple[Result, ...]:
    """Return advice for EPYC servers; empty for other machines."""
    if "EPYC" not in (host.cpu.model or "") or not host.cpu.sockets or len(host.cpu.l3) < 2:
        # An EPYC with a single L3 is a virtual machine, whose firmware is not the server's.
        return ()
    return (*_nodes(host), *_smt(host), _determinism())


def _nodes(host: Host) -> Iterator[Result]:
    nodes, sockets, l3 = len(host.cpu.numa), host.cpu.sockets or 1, len(host.cpu.l3)
    as_numa = nodes == l3 and nodes > 4 * sockets
    yield Result(
        name="bios-l3-as-numa", status="info", actual="on" if as_numa else "off",
        evidence="on: each L3 is a node, which shows the kernel where caches are, and helps small "
        "models and experts that fit one; a dense model larger than a cache gains nothing, and "
        "must be interleaved over all nodes",
    )  # fmt: skip
    if as_numa or not nodes or nodes % sockets:
        return
    yield Result(
        name="bios-nps", status="info", actual=f"NPS{nodes // sockets}",
        evidence="NPS1: one node a socket, every core uses all memory channels; right for one "
        "large model. NPS2 and NPS4: as many nodes with their own channels each; for several "
        "stacks that must not disturb each other, each with that part of the bandwidth",
    )  # fmt: skip


def _smt(host: Host) -> Iterator[Result]:
    if host.cpu.smt is None:
        return
    yield Result(
        name="bios-smt", status="info", actual="on" if host.cpu.smt else "off",
        evidence="generation is limited by memory and gains nothing from two threads a core; "
        "stackctl uses one thread a core either way; off makes neighbours quieter",
    )  # fmt: skip


def _determinism() -> Result:
    return Result(
        name="bios-determinism", status="info", actual="not visible from here",
        evidence="power: each part as fast as its own power limit lets it; performance: all parts "
        "equally fast, so that measurements of two machines compare",
    )  # fmt: skip
