"""Which image a stack runs, and what the engine in it understands."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from stackctl.deploy.context import Context
from stackctl.engines.engine import Engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.quantity import format_bytes
from stackctl.state.enginefacts import EngineFactsCache
from stackctl.state.generations import now
from stackctl.values.measured import EngineFacts
from stackctl.values.profile import Profile


def known_image(
    profile: Profile, engine: Engine, cache: EngineFactsCache
) -> tuple[str, str, EngineFacts | None]:
    """Image, reason and facts for planning only: what was seen last, else what is here by name."""
    for reference, reason in _candidates(profile, engine):
        if facts := cache.latest(reference):
            return facts.pinned, reason, facts
    candidates = _candidates(profile, engine)
    for reference, reason in candidates[:-1]:
        if podman.exists(reference):
            return reference, reason, None
    reference, reason = candidates[-1]
    return reference, reason, None


def ensure_image(
    context: Context,
    api: podman.Podman,
    profile: Profile,
    engine: Engine,
    before_pull: Callable[[str, str], None] | None = None,
) -> tuple[podman.Image, str, str]:
    """The image to run, pulled if need be; the name it was asked for by, and why this one.

    ``before_pull`` gets the last two and may raise: many gigabytes may be about to come.

    Raises:
        StackctlError: exit 6 when it is not here and cannot be pulled.
    """
    candidates = _candidates(profile, engine)
    for reference, reason in candidates:
        if found := api.image(reference):
            context.report.step("image", f"{reference}, present")
            return found, reference, reason
    reference, reason = candidates[-1]
    if reference.startswith("localhost/"):
        raise StackctlError(
            f"there is no local image {reference}",
            hint="stackctl image build llama-cpp, or another one: --set image=NAME",
            exit_code=ExitCode.HOST,
        )
    if before_pull is not None:
        before_pull(reference, reason)

    def report(progress: podman.PullProgress) -> None:
        text = progress.text[:60]
        if progress.total_bytes:
            text += f" {format_bytes(progress.done_bytes or 0)} of " + format_bytes(
                progress.total_bytes
            )
        context.report.progress("image", f"{reference}: {text}")

    context.report.progress("image", f"pulling {reference}")
    api.pull(reference, report)
    image = api.image(reference)
    if image is None:
        raise StackctlError(f"image {reference} is not here after its pull")
    context.report.step("image", f"{image.reference}, pulled, {format_bytes(image.bytes)}")
    return image, reference, reason


def inspect_engine(
    context: Context, engine: Engine, image: podman.Image, reference: str
) -> EngineFacts:
    """What the image's engine understands: from the cache, else by running its help once.

    Raises:
        StackctlError: exit 6 when the image does not hold the engine, or lacks curl.
    """
    cache = context.engine_facts
    known = cache.get(image.id)
    if known is not None:
        if known.reference != reference or known.pinned != image.reference:
            known = msgspec.structs.replace(
                known, reference=reference, pinned=image.reference, seen=now()
            )
            cache.put(known)
        return known
    context.report.progress("image", f"reading the options of {engine.program}")
    starts = image.entrypoint[0].rpartition("/")[2] if image.entrypoint else None
    if starts not in (None, engine.program):
        raise StackctlError(
            f"image {reference} starts {starts}, not {engine.program}",
            hint="an image whose entry point is the engine, or one without entry point",
            exit_code=ExitCode.HOST,
        )
    program = () if starts else (engine.program,)
    entrypoint = None if starts else engine.program
    help_text = podman.run_once(image.id, ["--help"], entrypoint=entrypoint)
    options = engine.parse_help(help_text.stdout) if help_text.status == 0 else ()
    if not options:
        lines = (help_text.stderr.strip() or help_text.stdout.strip()).splitlines()
        missing = help_text.status == 127 or "not found" in help_text.stderr
        raise StackctlError(
            f"image {reference} holds no {engine.program}"
            if missing
            else f"{engine.program} of image {reference} does not run here",
            details=lines[-3:],
            hint="stackctl image build llama-cpp, or another image: --set image=NAME",
            exit_code=ExitCode.HOST,
        )
    curl = podman.run_once(image.id, ["--version"], entrypoint="curl")
    if curl.status != 0:
        raise StackctlError(
            f"image {reference} has no curl, which its health check needs",
            hint="an image with curl; the engine's own and those of stackctl image build have it",
            exit_code=ExitCode.HOST,
        )
    version = podman.run_once(image.id, ["--version"], entrypoint=entrypoint)
    facts = EngineFacts(
        engine=engine.name,
        image_id=image.id,
        reference=reference,
        pinned=image.reference,
        seen=now(),
        version=engine.parse_version(version.stdout + version.stderr),
        program=program,
        options=options,
    )
    cache.put(facts)
    return facts


def _candidates(profile: Profile, engine: Engine) -> tuple[tuple[str, str], ...]:
    if profile.image is not None:
        return ((profile.image, "profile"),)
    return (
        (engine.local_image, "built on this machine"),
        (engine.default_image, f"published by {engine.name}; one built here would come first"),
    )
