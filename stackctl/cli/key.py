"""``stackctl key``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from stackctl.cli.options import pick_stack, stack_argument, yes_option
from stackctl.cli.session import Session, stackctl_command
from stackctl.errors import StackctlError
from stackctl.state import keys
from stackctl.values.history import KeyReport

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
    with _change(session, stack, "create") as (context, name):
        keys.create(context.paths.state, name)
    _tell(session, context, name)


@stackctl_command("show")
@stack_argument
def show(session: Session, stack: str | None) -> None:
    """Print the newest key of STACK, and nothing else."""
    context = session.context()
    name = _stack(context, stack)
    found = keys.require(context.paths.state, name)
    path = str(keys.path(context.paths.state, name))
    report = KeyReport(stack=name, path=path, valid=len(found), key=found[0])
    if not session.out.wrote_json(report):
        session.out.line(found[0])


@stackctl_command("rotate")
@stack_argument
@click.option("--keep", is_flag=True, help="Keep the previous key valid until the next rotate.")
def rotate(session: Session, stack: str | None, keep: bool) -> None:
    """Create a new key of STACK; a running front door uses it at once."""
    with _change(session, stack, "rotate") as (context, name):
        keys.rotate(context.paths.state, name, keep=keep)
    _tell(session, context, name)


@stackctl_command("path")
@stack_argument
def path(session: Session, stack: str | None) -> None:
    """Print where the key of STACK is stored."""
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
    with _change(session, stack, "remove") as (context, name):
        if not context.confirm(f"the keys of {name} would be removed"):
            raise StackctlError("nothing was changed")
        if not keys.remove_keys(context.paths.state, name):
            keys.require(context.paths.state, name)  # raises because there is no key
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


@contextlib.contextmanager
def _change(session: Session, stack: str | None, what: str) -> Iterator[tuple[Context, str]]:
    """Yield the context and the stack under the lock of the scope.

    After the change make a running front door read the keys again, and record the change.
    """
    from stackctl.deploy import proxy
    from stackctl.deploy.lifecycle import exclusive_change
    from stackctl.units.proxy_unit import proxy_service

    context = session.context()
    name = _stack(context, stack)
    operation = f"key {what}"
    with exclusive_change(context, f"{operation} {name}"):
        yield context, name
        try:
            proxy.reload_keys(context, name)
        except StackctlError as error:
            context.write_audit_entry(operation, name, result="failed", message=error.message)
            scope = " --user" if context.paths.scope == "user" else ""
            raise StackctlError(
                f"the change is stored, but the running door of {name} still lets in the earlier "
                "keys",
                details=(error.message,),
                hint=f"systemctl{scope} restart {proxy_service(name)}",
            ) from None
        context.write_audit_entry(operation, name)


def _tell(session: Session, context: Context, stack: str) -> None:
    """Print where the keys are stored and how many are valid, not the keys."""
    file = keys.path(context.paths.state, stack)
    valid = len(keys.read(context.paths.state, stack))
    if session.out.wrote_json(KeyReport(stack=stack, path=str(file), valid=valid)):
        return
    session.out.line(f"{stack}: {valid} {'key is' if valid == 1 else 'keys are'} valid, in {file}")
    session.out.note(f"stackctl key show {stack} prints it")
