"""``stackctl prune``."""

from __future__ import annotations

import click

from stackctl.cli.options import pick_stack, stack_argument, yes_option
from stackctl.cli.session import Session, stackctl_command


@stackctl_command("prune")
@stack_argument
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=10,
    metavar="N",
    help="Number of newest generations to keep (10).",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, change nothing.")
@yes_option
def command(session: Session, stack: str | None, keep: int, dry_run: bool) -> None:
    """Remove old generations of STACK: their plans and units, not images, models or logs.

    The installed generation and the target of a rollback always stay. Compile caches of images
    that no generation of any stack uses are removed too. The command asks first, because nothing
    of it can be restored.
    """
    from stackctl.deploy.prune import compile_caches_text, prune

    context = session.context()
    found = prune(context, pick_stack(context, stack, past=True), keep=keep, dry_run=dry_run)
    if session.out.wrote_json(found):
        return
    kept = ", ".join(map(str, found.kept)) or "none"
    done = "would remove" if dry_run else "removed"
    if not found.removed:
        session.out.line(f"{found.stack}: nothing to remove, kept {kept}")
    else:
        removed = ", ".join(map(str, found.removed))
        session.out.line(f"{found.stack}: {done} {removed}; {'keep' if dry_run else 'kept'} {kept}")
    if found.caches:
        session.out.line(f"{done} {compile_caches_text(found)}")
