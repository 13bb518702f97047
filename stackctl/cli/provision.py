"""``stackctl provision``."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stackctl.cli import provision_view
from stackctl.cli.options import folder_option, profile_names, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import ExitCode, StackctlError, did_you_mean

if TYPE_CHECKING:
    from stackctl.provision.apply import UndoStore
    from stackctl.provision.target_root import TargetRoot
    from stackctl.requirements.facts import MachineFacts
    from stackctl.values.provision import ItemPlan, ItemReport


def _item_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from stackctl.requirements import ITEMS

    return [name for name in ITEMS if name.startswith(incomplete)]


@stackctl_command("provision")
@click.option(
    "--profile", "profiles", multiple=True, shell_complete=profile_names,
    help="Prepare for this profile; may be repeated. Default: all that this machine can run.",
)  # fmt: skip
@click.option(
    "--only", multiple=True, metavar="ITEM", shell_complete=_item_names,
    help="Only this item, even if it has no effect yet.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would change, change nothing.")
@click.option("--undo", is_flag=True, help="Restore the previous state.")
@click.option(
    "--service-user", metavar="NAME",
    help="Account that runs rootless stacks; created if missing. Default: the caller of sudo.",
)  # fmt: skip
@click.option(
    "--restart-user", is_flag=True,
    help="Apply new limits now: restarts the user's service manager, which ends all its sessions.",
)  # fmt: skip
@folder_option
@yes_option
def command(
    session: Session,
    profiles: tuple[str, ...],
    only: tuple[str, ...],
    dry_run: bool,
    undo: bool,
    service_user: str | None,
    restart_user: bool,
) -> None:
    """Make this machine ready for stacks, and show each change with its reason first.

    It can be run again at any time: it leaves settings that are right, and never overrules
    settings of others. For the firmware it only prints advice. Exits 6 when an item was refused.
    """
    _require_items(only)
    # Only root can read the record of the previous state.
    if os.geteuid() != 0 and (undo or not dry_run):
        _become_root(undo=undo)
    if undo:
        _undo(session, only, dry_run)
        return
    _provision(session, profiles, only, dry_run, service_user or _caller(), restart_user)


def _require_items(only: Sequence[str]) -> None:
    from stackctl.requirements import ITEMS

    for name in only:
        if name not in ITEMS:
            raise StackctlError(
                f"there is no item {name!r}",
                hint=did_you_mean(name, ITEMS, "items: " + " ".join(ITEMS)),
                exit_code=ExitCode.USAGE,
            )


def _become_root(*, undo: bool) -> None:
    """Run this command again as root by sudo, which may ask for a password.

    Raises StackctlError (exit 2) if there is no terminal and sudo needs a password.
    """
    from stackctl.machine import runner

    words = (*runner.own_command(), *sys.argv[1:])
    hint = f"as root: {shlex.join(words)}"
    ask = () if sys.stdin.isatty() else ("-n",)
    if ask:
        try:
            refused = runner.run(("sudo", "-n", "true"), check=False).status != 0
        except StackctlError:
            refused = True
        if refused:
            need = "provisioning changes the machine, which needs root"
            if undo:
                need = "only root can read the record of the previous state"
            raise StackctlError(
                f"{need}, and sudo does not let this user without a password",
                hint=hint if undo else f"{hint}; --dry-run shows what it would do",
                exit_code=ExitCode.USAGE,
            )
    runner.exec_program(("sudo", *ask, *words), hint=hint)


def _caller() -> str | None:
    """Return the user who will run stacks: this one, or the caller of sudo; None for root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    name = os.environ.get("SUDO_USER")
    try:
        return name if name and pwd.getpwnam(name).pw_uid != 0 else None
    except KeyError:
        return None


def _provision(
    session: Session,
    profiles: Sequence[str],
    only: Sequence[str],
    dry_run: bool,
    user: str | None,
    restart_user: bool,
) -> None:
    from stackctl.provision import facts, firmware_advice, items
    from stackctl.values.profile import Overrides
    from stackctl.values.provision import ProvisionReport

    _require_name(user)
    wanted = [session.profiles().resolve(name, Overrides()) for name in profiles]
    target, store = _machine()
    with _lock(dry_run):
        seen = facts.read_facts(target, store, user)
        needed = items.needs_of_profiles(wanted, seen.host, only)

        def planned(facts: MachineFacts) -> tuple[ItemPlan, ...]:
            return items.plan_items(facts, needed, only)

        plans = planned(seen)
        if not session.out.json:
            for plan in plans:
                provision_view.show_item(
                    session.out, _report(plan, seen), full=dry_run or not session.yes
                )
        if not dry_run and not only:
            _require_podman(plans)
        seen_after = seen if dry_run else _apply(session, target, store, plans, seen, planned)
        waiting = items.pending_until_login(seen_after)
        if waiting and not dry_run:
            waiting = _restart(session, seen_after, waiting, restart_user)
    told = tuple(
        f"{what}: when the service manager of {user} starts anew (log out everywhere, or reboot)"
        for what in waiting
    )
    report = ProvisionReport(
        operation="provision",
        dry_run=dry_run,
        service_user=user,
        items=tuple(_report(plan, seen, done=not dry_run) for plan in plans),
        changed=sum(plan.status == "change" for plan in plans),
        pending=told,
        advice=() if only else firmware_advice.firmware_advice(seen.host),
    )
    if not session.out.wrote_json(report):
        provision_view.show_end(session.out, report)
    if any(plan.status == "refused" for plan in plans):
        raise click.exceptions.Exit(int(ExitCode.HOST))


def _apply(
    session: Session,
    target: TargetRoot,
    store: UndoStore,
    plans: Sequence[ItemPlan],
    seen: MachineFacts,
    planned: Callable[[MachineFacts], Sequence[ItemPlan]],
) -> MachineFacts:
    """Ask, then make the planned changes. Return the facts of the machine after them."""
    from stackctl.provision import facts
    from stackctl.provision.apply import apply_plans, require_ready
    from stackctl.state import logs

    changing = [plan for plan in plans if plan.status == "change"]
    if not changing:
        return seen
    require_ready(target, plans)
    if not session.confirm(f"{provision_view.count_text(len(changing))} would change"):
        raise click.Abort
    apply_plans(
        target, store, plans, logs.current_user(), provision_view.IndentedProgress(session.out)
    )
    after = facts.read_facts(target, store, seen.user.name if seen.user is not None else None)
    changed = {plan.item for plan in changing}
    if left := [plan for plan in planned(after) if plan.item in changed and plan.status != "ok"]:
        raise StackctlError(
            f"{', '.join(plan.item for plan in left)}: changed, and yet not as it should be",
            details=[f"{p.item}: {p.problem or p.now or p.status}" for p in left],
            hint="something else sets it too; stackctl provision --dry-run shows what is left",
        )
    return after


def _undo(session: Session, only: Sequence[str], dry_run: bool) -> None:
    from stackctl.provision.apply import require_no_stacks, undo_changes, undo_order
    from stackctl.provision.change_text import describe_revert
    from stackctl.values.provision import ItemReport, ProvisionReport

    target, store = _machine()

    def chosen(item: str) -> bool:
        return not only or item in only

    with _lock(dry_run):
        done = undo_order(store, chosen)
        require_no_stacks(target, done)
        names = tuple(dict.fromkeys(one.item for one in done))
        texts = {
            name: tuple(describe_revert(o.change, o.before) for o in done if o.item == name)
            for name in names
        }
        if not session.out.json:
            for name in names:
                one = ItemReport(item=name, status="undo", changes=texts[name])
                provision_view.show_item(session.out, one, full=True)
        stay: tuple[tuple[str, str], ...] = ()
        if done and not dry_run:
            if not session.confirm(
                f"{provision_view.count_text(len(names))} would go back to what was before"
            ):
                raise click.Abort
            progress = provision_view.IndentedProgress(session.out)
            stay = undo_changes(target, store, chosen, progress)
    kept = dict(stay)
    reports = tuple(
        ItemReport(
            item=name,
            status="kept" if name in kept else "undo" if dry_run else "undone",
            changes=texts[name],
            problem=kept.get(name),
        )
        for name in names
    )
    report = ProvisionReport(
        operation="undo", dry_run=dry_run, items=reports, changed=len(names) - len(kept)
    )
    if not session.out.wrote_json(report):
        provision_view.show_end(session.out, report, stay)


def _machine() -> tuple[TargetRoot, UndoStore]:
    from stackctl.machine.machine import Machine
    from stackctl.provision.apply import PATH, UndoStore
    from stackctl.provision.target_root import TargetRoot

    return TargetRoot(Machine()), UndoStore(Path(PATH))


def _lock(dry_run: bool) -> contextlib.AbstractContextManager[None]:
    """Return the lock of the system's scope, which all scopes share here; none for a dry run."""
    if dry_run:
        return contextlib.nullcontext()
    from stackctl.machine import lock
    from stackctl.state.paths import scope_paths

    return lock.exclusive(scope_paths("system", {}).lock, "provision")


def _require_name(user: str | None) -> None:
    import re

    # Every useradd accepts these names, and none of them looks like an option.
    if user is not None and (not re.fullmatch(r"[a-z_][a-z0-9_.-]{0,30}", user) or user == "root"):
        raise StackctlError(
            f"{user!r} cannot be the service user",
            hint="an account of its own: small letters, digits, - and _; root needs none",
            exit_code=ExitCode.USAGE,
        )


def _require_podman(plans: Sequence[ItemPlan]) -> None:
    """Raise StackctlError if Podman is refused, because the other items serve no purpose then."""
    for plan in plans:
        if plan.item == "podman" and plan.status == "refused":
            raise StackctlError(
                f"{plan.problem}: nothing was changed", hint=plan.remedy, exit_code=ExitCode.HOST
            )


def _restart(
    session: Session, seen: MachineFacts, waiting: tuple[str, ...], restart_user: bool
) -> tuple[str, ...]:
    """Restart the user's service manager if the user wants it.

    Return the settings that still wait for a new service manager.
    """
    from stackctl.provision import facts, items
    from stackctl.provision.changes import restart_manager

    assert seen.user is not None and seen.user.uid is not None
    name, uid = seen.user.name, seen.user.uid
    if not restart_user:
        session.out.warn(
            f"{' and '.join(waiting)}: only a new service manager of {name} has it; to start it "
            f"anew ends every session and rootless stack of {name}",
            fix=f"stackctl provision --restart-user --service-user {name}, or log in anew",
        )
        ask = sys.stdin.isatty() and not session.yes
        if not (ask and click.confirm(f"end all sessions of {name} now?", err=True)):
            return waiting
    restart_manager(uid)
    session.out.step("restart", f"user@{uid}.service")
    return items.pending_until_login(facts.read_facts(*_machine(), name))


def _report(plan: ItemPlan, seen: MachineFacts, *, done: bool = False) -> ItemReport:
    from stackctl.provision.change_text import describe
    from stackctl.values.provision import ItemReport

    return ItemReport(
        item=plan.item,
        status="changed" if done and plan.status == "change" else plan.status,
        why=plan.why, now=plan.now,
        changes=tuple(describe(change, seen) for change in plan.changes),
        undo=plan.undo, effect=plan.effect, problem=plan.problem, remedy=plan.remedy,
    )  # fmt: skip
