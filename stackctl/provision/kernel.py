"""Settings of the kernel: until the next boot through its files, from then on by a file in /etc."""

from __future__ import annotations

from stackctl.provision import ours, paths
from stackctl.provision.facts import Facts, Needs
from stackctl.values.provision import ItemPlan, SettingChange

_SHARED = "a container has the settings of the machine it runs on: set it there"
#: What keeps engines in memory under pressure; doctor warns above 30.
_SWAPPINESS, _HIGH = "10", 30


def numa_balancing(facts: Facts, needs: Needs) -> ItemPlan:
    """Automatic NUMA balancing off, where there is more than one node."""
    item, why = "numa-balancing", "the kernel would move pages of a model while it is read"
    if len(facts.host.cpu.numa) < 2 and item not in needs.named:
        return ours.skipped(item, why, "one NUMA node: nothing to balance")
    return _setting(
        facts, item, why, paths.NUMA_SETTING, "kernel.numa_balancing", paths.NUMA, "0", ("0",)
    )


def hugepages(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """Transparent huge pages for who asks; "never" was somebody's choice, and is left."""
    item = "transparent-hugepages"
    why = "engines ask for huge pages; programs that do not would take more memory than they need"
    return _setting(
        facts, item, why, paths.HUGEPAGES_SETTING, paths.HUGEPAGES_SETTING, paths.HUGEPAGES,
        "madvise", ("madvise", "never"),
    )  # fmt: skip


def swappiness(facts: Facts, needs: Needs) -> ItemPlan:
    """Little swapping, where there is swap."""
    item, why = "swappiness", "an engine whose pages were swapped out answers late"
    if not facts.swap and item not in needs.named:
        return ours.skipped(item, why, "no swap")
    accepted = tuple(str(number) for number in range(_HIGH + 1))
    return _setting(
        facts, item, why, paths.SWAPPINESS_SETTING, "vm.swappiness", paths.SWAPPINESS,
        _SWAPPINESS, accepted,
    )  # fmt: skip


def governor(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """The governor "performance" on every processor."""
    item = "governor"
    why = "processors that slow down between requests answer the next one late"
    found = sorted({s.value for path, s in facts.settings.items() if _is_governor(path)})
    if not found:
        return ours.skipped(item, why, "this machine does not let its kernel choose the frequency")
    slow = tuple(
        path
        for path, setting in facts.settings.items()
        if _is_governor(path) and setting.value != "performance"
    )
    if any(not facts.settings[path].writable for path in slow):
        return ours.skipped(item, why, f"{', '.join(found)}: {_SHARED}")
    rival, stands = ours.standing(facts, paths.GOVERNOR_SETTINGS, paths.GOVERNOR, ("performance",))
    if not slow and (stands or rival is None):
        return ours.set_already(item, why, "performance", rival)
    if rival is not None and not stands:
        return ours.overruled(item, why, rival)
    file = None if stands else ours.shipped_file(facts, paths.GOVERNOR)
    if file is not None and (refused := ours.foreign(facts, item, why, file)):
        return refused
    setting = SettingChange(paths=slow, value="performance") if slow else None
    undo = "removes the file and puts the governors back"
    return ours.planned(item, why, ", ".join(found), undo, file, setting)


def _is_governor(path: str) -> bool:
    return path.endswith("/scaling_governor")


def _setting(
    facts: Facts, item: str, why: str, path: str, key: str, name: str, value: str,
    accepted: tuple[str, ...],
) -> ItemPlan:  # fmt: skip
    """One file of the kernel, and the file in /etc that sets it at boot."""
    setting = facts.settings.get(path)
    if setting is None:
        return ours.skipped(item, why, f"this kernel has no {path}")
    rival, stands = ours.standing(facts, key, name, accepted)
    good = setting.value in accepted
    if good and (stands or rival is None):
        # A kernel that does so by itself needs no file.
        return ours.set_already(item, why, setting.value, rival)
    if not setting.writable:
        return ours.skipped(item, why, f"{setting.value}: {_SHARED}")
    if rival is not None and not stands:
        return ours.overruled(item, why, rival)
    file = None if stands else ours.shipped_file(facts, name)
    if file is not None and (refused := ours.foreign(facts, item, why, file)):
        return refused
    change = None if good else SettingChange(paths=(path,), value=value)
    undo = f"removes the file and sets {setting.value} again"
    return ours.planned(item, why, setting.value, undo, file, change)
