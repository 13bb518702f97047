"""What rootless stacks need: an account, subordinate ids, lingering, and what systemd hands on."""

from __future__ import annotations

import re

from stackctl.provision import ours, paths
from stackctl.provision.facts import Facts, Needs, User
from stackctl.quantity import format_bytes
from stackctl.values.host import UNLIMITED
from stackctl.values.provision import (
    AccountChange,
    Change,
    FileChange,
    ItemPlan,
    LingerChange,
    ReloadChange,
    SubidsChange,
)

_NOBODY = "root runs stacks of the system; rootless ones: --service-user NAME"
#: What Debian, Ubuntu and Fedora give a user; images of containers use ids up to 65535.
_COUNT, _FIRST = 65536, 100_000
_CAPABILITY = "process 1 lacks CAP_SYS_RESOURCE: no setting inside this machine can raise it"
#: The hard limit and controllers that a manager has when it starts anew.
_EFFECT = "login"


def service_user(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """The account that runs rootless stacks."""
    item, why = "service-user", "rootless stacks run as an account with no other rights"
    user = facts.user
    if user is None:
        return ours.skipped(item, why, _NOBODY)
    if user.uid is not None:
        return ours.set_already(item, why, f"{user.name} ({user.uid})", None)
    change = AccountChange(user=user.name, home=f"/var/lib/{user.name}")
    undo = "removes the account; its home stays when something is in it"
    return ours.planned(item, why, None, undo, change)


def subids(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """65,536 subordinate user and group ids."""
    item = "subids"
    why = "a rootless container's users are mapped to ids of their own"
    user = facts.user
    if user is None:
        return ours.skipped(item, why, _NOBODY)
    uid = None if _owned(facts.subuid, user) >= _COUNT else _free(facts.subuid)
    gid = None if _owned(facts.subgid, user) >= _COUNT else _free(facts.subgid)
    if uid is None and gid is None:
        return ours.set_already(item, why, f"{user.name} has {_owned(facts.subuid, user)}", None)
    change = SubidsChange(user=user.name, uid=uid, gid=gid, count=_COUNT)
    has = _owned(facts.subuid, user), _owned(facts.subgid, user)
    now = f"{user.name} has {has[0]} for users, {has[1]} for groups"
    return ours.planned(item, why, now, "takes these ids away again", change)


def linger(facts: Facts, needs: Needs) -> ItemPlan:  # noqa: ARG001
    """Services of the user from boot on, and after logouts."""
    item, why = "linger", "without it rootless stacks start at login and end at logout"
    if facts.user is None:
        return ours.skipped(item, why, _NOBODY)
    if facts.user.lingers:
        return ours.set_already(item, why, f"on for {facts.user.name}", None)
    undo = "ends the services of this user when nobody is logged in"
    return ours.planned(item, why, "off", undo, LingerChange(user=facts.user.name))


def cpuset(facts: Facts, needs: Needs) -> ItemPlan:
    """The controllers that user managers hand on, with cpuset."""
    item = "cpuset"
    why = "rootless stacks can be bound to CPUs and NUMA nodes only with the cpuset controller"
    user = facts.user
    if item not in needs.named:
        if user is None:
            return ours.skipped(item, why, _NOBODY)
        if not needs.cpuset:
            return ours.skipped(item, why, "one NUMA node, and no profile binds CPUs")
        if "cpuset" not in facts.root_controllers:
            has = " ".join(facts.root_controllers) or "none"
            return ours.skipped(item, why, f"this kernel hands on no cpuset controller: {has}")
    now = None
    if user is not None and user.uid is not None:
        given = user.controllers or user.controllers_next
        now = f"{user.name} has {' '.join(given) or 'nothing'}"
        if "cpuset" in user.controllers_next and not user.stale:
            rival, stands = ours.standing(facts, "Delegate", paths.DELEGATE, ("cpuset", "yes"))
            return ours.set_already(item, why, now, rival if stands else None)
    return _drop_in(facts, item, why, now, paths.DELEGATE, "Delegate", ("cpuset", "yes", "true"))


def memlock(facts: Facts, needs: Needs) -> ItemPlan:
    """The limit of locked memory that user managers have."""
    item, why = "memlock", "a model that is locked in memory is never paged out"
    user, most = facts.user, facts.memlock_reachable
    if item not in needs.named:
        if user is None:
            return ours.skipped(item, why, _NOBODY)
        if not needs.memlock:
            return ours.skipped(item, why, "engines on a GPU lock nothing")
        # One that does not run yet will have all there is.
        limit = most if user.memlock_bytes is None else user.memlock_bytes
        if facts.may_raise is False and (limit or 0) >= (most or 0):
            return ours.skipped(item, why, _CAPABILITY)
    now = None
    if user is not None and user.uid is not None:
        now = f"{user.name} may lock {_limit(user.memlock_bytes)}"
        if user.memlock_next == UNLIMITED and not user.stale:
            rival, stands = ours.standing(facts, "LimitMEMLOCK", paths.MEMLOCK, ("infinity",))
            return ours.set_already(item, why, now, rival if stands else None)
    return _drop_in(facts, item, why, now, paths.MEMLOCK, "LimitMEMLOCK", ("infinity",))


def pending(facts: Facts) -> tuple[str, ...]:
    """What the user's running manager lacks and its next one will have, in words."""
    user = facts.user
    if user is None or user.uid is None or not user.running:
        return ()
    found = []
    most = UNLIMITED if facts.may_raise else facts.memlock_reachable
    reach = min(user.memlock_next or 0, most or 0)
    if user.memlock_bytes is not None and user.memlock_bytes < reach:
        found.append(f"memlock ({_limit(user.memlock_bytes)} now, {_limit(reach)} then)")
    if "cpuset" in {*user.controllers_next} & {*facts.root_controllers} - {*user.controllers}:
        found.append("cpuset")
    return tuple(found)


def _limit(limit: int | None) -> str:
    if limit is None:
        return "an unknown amount"
    return "without limit" if limit == UNLIMITED else f"{format_bytes(limit)} at most"


def _drop_in(
    facts: Facts, item: str, why: str, now: str | None, name: str, key: str,
    accepted: tuple[str, ...],
) -> ItemPlan:  # fmt: skip
    rival, stands = ours.standing(facts, key, name, accepted)
    if rival is not None and not stands:
        return ours.overruled(item, why, rival)
    file: FileChange | None = None if stands else ours.shipped_file(facts, name)
    if file is not None and (refused := ours.foreign(facts, item, why, file)):
        return refused
    stale = facts.user is not None and facts.user.stale
    reload: Change | None = ReloadChange() if file is not None or stale else None
    plan = ours.planned(item, why, now or paths.FILES[name], "removes the file", file, reload)
    if plan.status != "change":
        return plan
    import msgspec

    return msgspec.structs.replace(plan, effect=_EFFECT)


def _ranges(text: str) -> list[tuple[str, int, int]]:
    """Owner, first id and count of each line of /etc/subuid or /etc/subgid."""
    found = re.findall(r"^([^:#\s]+):(\d{1,10}):(\d{1,10})$", text, re.MULTILINE)
    return [(owner, int(first), int(count)) for owner, first, count in found]


def _owned(text: str, user: User) -> int:
    names = {user.name, str(user.uid)}
    return sum(count for owner, _, count in _ranges(text) if owner in names)


def _free(text: str) -> int:
    """The first of so many ids that nobody has."""
    start = _FIRST
    for _, first, count in sorted(_ranges(text), key=lambda item: item[1]):
        if first < start + _COUNT and start < first + count:
            start = first + count
    return start
