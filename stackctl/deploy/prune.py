"""Removes old generations, and the compile caches of images that the others do not use."""

from __future__ import annotations

from stackctl.deploy import unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.lifecycle import exclusive_change
from stackctl.deploy.stack_state import installed_number
from stackctl.errors import StackctlError
from stackctl.machine import files
from stackctl.quantity import format_bytes
from stackctl.values.history import PruneReport


def prune(context: Context, stack: str, *, keep: int, dry_run: bool) -> PruneReport:
    """Remove all but the ``keep`` (1 or more) newest generations of a stack, and then the caches of
    images that no generation of any stack uses.

    The installed generation and the target of a rollback stay. The newest stays even if it failed,
    because each number is used only once.

    Raises:
        StackctlError: exit 7 while another stackctl is at work, 1 if the user declined.
    """
    with exclusive_change(context, f"prune {stack}", dry_run):
        numbers = context.generations.numbers(stack)
        current = installed_number(context, stack)
        target = context.generations.rollback_target(stack, current)
        kept = {*numbers[-max(1, keep) :], current, target.number if target else None}
        removed = tuple(number for number in numbers if number not in kept)
        unused = _unused(context, stack, removed)
        chosen = PruneReport(
            stack=stack,
            dry_run=dry_run,
            removed=removed,
            kept=tuple(number for number in numbers if number in kept),
            caches=len(unused),
            freed_bytes=sum(unused.values()),
        )
        if dry_run or not (removed or unused):
            return chosen
        if not context.confirm(_question(chosen)):
            raise StackctlError("nothing was changed")
        for number in removed:
            context.generations.remove(stack, number)
        for name in unused:
            files.remove_subfolder(context.paths.compile_caches, name)
        context.write_audit_entry("prune", stack, message="removed " + _listed(chosen))
        return chosen


def _unused(context: Context, stack: str, removed: tuple[int, ...]) -> dict[str, int]:
    """Return the caches of images that no remaining generation uses, with their bytes."""
    found = files.folder_sizes(context.paths.compile_caches)
    store = context.generations
    for other in store.stacks() if found else ():
        for number in store.numbers(other):
            if other == stack and number in removed:
                continue
            try:
                image = store.read(other, number).image_id
            except StackctlError as problem:
                # An unreadable generation may use any cache.
                context.progress.warn(f"compiled code stays: {problem.message}")
                return {}
            found.pop(context.paths.compile_cache(image).name, None)
    # The record of an installed generation may be lost.
    stacks = unit_files.installed_stacks(context)
    units = [file.text for other in stacks for file in unit_files.installed(context, other)]
    return {name: size for name, size in found.items() if not any(name in text for text in units)}


def _question(chosen: PruneReport) -> str:
    count = len(chosen.removed)
    parts = [f"{count} of {count + len(chosen.kept)} generations of {chosen.stack}"] * bool(count)
    parts += [compile_caches_text(chosen)] * bool(chosen.caches)
    return " and ".join(parts) + " would be removed for good"


def compile_caches_text(report: PruneReport) -> str:
    """Return the removed caches of a report, as text."""
    images = "1 image" if report.caches == 1 else f"{report.caches} images"
    return f"the compiled code of {images} ({format_bytes(report.freed_bytes)})"


def _listed(chosen: PruneReport) -> str:
    parts = [", ".join(map(str, chosen.removed))] * bool(chosen.removed)
    return " and ".join([*parts, *[compile_caches_text(chosen)] * bool(chosen.caches)])
