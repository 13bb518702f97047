"""What stacks on a GPU need beyond its driver: the container toolkit, CDI files, SELinux."""

from __future__ import annotations

import re

from stackctl.probe.doctor_gpu import gpu_findings
from stackctl.provision import ours, paths
from stackctl.provision.facts import Facts, Needs
from stackctl.values.provision import Change, EnableChange, ItemPlan, PackagesChange

#: The first toolkit with a service that describes the GPUs anew at each boot.
_WITH_SERVICE = (1, 18)


def cdi(facts: Facts, needs: Needs) -> ItemPlan:
    """A description of the GPUs for Podman that is made anew at each boot."""
    item, why = "cdi", "Podman gives a container its GPU by a CDI file, made anew for each driver"
    if not needs.gpu:
        return ours.skipped(item, why, "no profile that was named uses a GPU")
    if not facts.host.gpus and item not in needs.named:
        return ours.skipped(item, why, "no GPU")
    found = {result.name: result for result in gpu_findings(facts.host)}
    for name in ("gpu", "gpu-driver"):
        if name in found and found[name].status == "fail":
            return _refused(item, why, found[name].actual or name, found[name].remedy)
    state = found.get("cdi")
    if state is not None and state.status != "fail":
        return ours.set_already(item, why, state.actual or "", None)
    specs = facts.host.tools.cdi
    for spec in specs:
        if spec.path.startswith("/etc/cdi/"):
            # The file of somebody else: what refreshes the others does not touch it.
            problem = f"{spec.path} is not stackctl's: {spec.problem or 'it names other devices'}"
            return _refused(item, why, problem, f"sudo rm {spec.path}, then again")
    return _refresh(facts, item, why, state.actual if state else None)


def _refresh(facts: Facts, item: str, why: str, now: str | None) -> ItemPlan:
    """The toolkit, and the service that has it write the file: its own, else ours."""
    changes: list[Change] = []
    version = (facts.packages or {}).get(paths.TOOLKIT)
    if version is None:
        if facts.packages is None or facts.toolkit is None:
            return _refused(
                item, why, f"no package source here has {paths.TOOLKIT}",
                "add NVIDIA's package source (see its guide: Installing the NVIDIA Container "
                "Toolkit), then again",
            )  # fmt: skip
        version = facts.toolkit
        changes.append(PackagesChange(names=(paths.TOOLKIT,)))
    numbers = tuple(int(number) for number in re.findall(r"\d{1,6}", version)[:2])
    if numbers >= _WITH_SERVICE or "nvidia-cdi-refresh.service" in facts.units:
        units: tuple[str, ...] = ("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service")
    else:
        file = ours.shipped_file(facts, paths.CDI_SERVICE)
        if file is not None:
            if refused := ours.foreign(facts, item, why, file):
                return refused
            changes.append(file)
        units = ("stackctl-cdi-refresh.service",)
    left = [unit for unit in units if unit not in facts.enabled]
    if not left and not changes:
        return _refused(
            item, why, f"{units[-1]} runs, and yet: {now}",
            f"see why: journalctl -u {units[-1]}; then: sudo systemctl restart {units[-1]}",
        )  # fmt: skip
    changes += [EnableChange(unit=unit) for unit in left]
    return ours.planned(item, why, now, "stops the service; removes what was installed", *changes)


def selinux(facts: Facts, needs: Needs) -> ItemPlan:
    """The permission that a person must give: the policy is theirs."""
    item, why = "selinux", "under SELinux containers may use a GPU only where a boolean says so"
    if not needs.gpu or not facts.host.gpus or facts.host.tools.selinux != "enforcing":
        return ours.skipped(item, why, "not enforcing, or no GPU is used")
    (state,) = [result for result in gpu_findings(facts.host) if result.name == "selinux"]
    if state.status == "ok":
        return ours.set_already(item, why, state.actual or "", None)
    return _refused(item, why, f"SELinux: {state.actual}", state.remedy)


def _refused(item: str, why: str, problem: str, remedy: str | None) -> ItemPlan:
    return ItemPlan(item=item, status="refused", why=why, problem=problem, remedy=remedy)
