"""``stackctl key``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_argument, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import StackctlError

if TYPE_CHECKING:
    from stackctl.deploy.context import Context


@click.group("key")
def command() -> None:
    """Create, show, change and remove the API key of a stack.

    It is for profiles with api_key: true. Only "show" prints the key.
    """


@stackctl_command("create")
@stack_argument
def create(session: Session, stack: str | None) -> None:
    """Create the first key of STACK and print where it is stored."""
    from stackctl.deploy.lifecycle import exclusive_change
    from stackctl.state import keys

    context = session.context()
    name = _stack(context, stack)
    with exclusive_change(context, f"key create {name}"):
        keys.create(context.paths.state, name)
        _changed(context, "create", name)
    _tell(session, context, name)


@stackctl_command("show")
@stack_argument
def show(session: Session, stack: str | None) -> None:
    """Print the newest key of STACK, and nothing else."""
    from stackctl.state import keys
    from stackctl.values.history import KeyReport

    context = session.context()
    name = _stack(context, stack)
    found = keys.require(context.paths.state, name)
    if session.out.json:
        path = str(keys.path(context.paths.state, name))
        session.out.data(KeyReport(stack=name, path=path, valid=len(found), key=found[0]))
    else:
        session.out.line(found[0])


@stackctl_command("rotate")
@stack_argument
@click.option("--keep", is_flag=True, help="Keep the previous key valid until the next rotate.")
def rotate(session: Session, stack: str | None, keep: bool) -> None:
    """Create a new key of STACK; a running front door uses it at once."""
    from stackctl.deploy.lifecycle import exclusive_change
    from stackctl.state import keys

    context = session.context()
    name = _stack(context, stack)
    with exclusive_change(context, f"key rotate {name}"):
        keys.rotate(context.paths.state, name, keep=keep)
        _changed(context, "rotate", name)
    _tell(session, context, name)


@stackctl_command("path")
@stack_argument
def path(session: Session, stack: str | None) -> None:
    """Print where the key of STACK is stored."""
    from stackctl.state import keys

    context = session.context()
    name = _stack(context, stack)
    keys.require(context.paths.state, name)
    if session.out.json:
        _tell(session, context, name)
    else:
        session.out.line(str(keys.path(context.paths.state, name)))


@stackctl_command("remove")
@stack_argument
@yes_option
def remove(session: Session, stack: str | None) -> None:
    """Remove the keys of STACK: clients that use them are refused from then on."""
    from stackctl.deploy.lifecycle import exclusive_change
    from stackctl.state import keys

    context = session.context()
    name = _stack(context, stack)
    with exclusive_change(context, f"key remove {name}"):
        if not context.confirm(f"the keys of {name} would be removed"):
            raise StackctlError("nothing was changed")
        if not keys.remove_keys(context.paths.state, name):
            keys.require(context.paths.state, name)  # raises because there is no key
        _changed(context, "remove", name)
    if session.out.json:
        _tell(session, context, name)
    else:
        session.out.line(f"{name} has no key any more")


for _command in (create, show, rotate, path, remove):
    command.add_command(_command)


def _stack(context: Context, name: str | None) -> str:
    """Return the stack's name. A key may be created before the first ``up`` of its stack."""
    from stackctl.values.profile import NAME_PATTERN

    try:
        return pick_stack(context, name, past=True)
    except StackctlError:
        if name is None or re.fullmatch(NAME_PATTERN.strip("^$"), name) is None:
            raise
        return name


def _changed(context: Context, what: str, stack: str) -> None:
    """Make a running front door read the keys again, and record the change."""
    from stackctl.deploy import proxy
    from stackctl.units.proxy_unit import proxy_service

    try:
        proxy.reload_keys(context, stack)
    except StackctlError as error:
        context.write_audit_entry(f"key {what}", stack, result="failed", message=error.message)
        scope = " --user" if context.paths.scope == "user" else ""
        raise StackctlError(
            f"the change is stored, but the running door of {stack} still lets in the earlier keys",
            details=(error.message,),
            hint=f"systemctl{scope} restart {proxy_service(stack)}",
        ) from None
    context.write_audit_entry(f"key {what}", stack)


def _tell(session: Session, context: Context, stack: str) -> None:
    """Print where the keys are stored and how many are valid, not the keys."""
    from stackctl.state import keys
    from stackctl.values.history import KeyReport

    file = keys.path(context.paths.state, stack)
    valid = len(keys.read(context.paths.state, stack))
    if session.out.wrote_json(KeyReport(stack=stack, path=str(file), valid=valid)):
        return
    session.out.line(f"{stack}: {valid} {'key is' if valid == 1 else 'keys are'} valid, in {file}")
    session.out.note(f"stackctl key show {stack} prints it")
