"""Choice of a stack's images, and the options of the engine in them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from stackctl.deploy import image_build
from stackctl.deploy.context import Context
from stackctl.engines.image_recipe import ImageRecipe
from stackctl.engines.protocol import Engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman, podman_api
from stackctl.quantity import format_bytes
from stackctl.state.generations import utc_now
from stackctl.state.learned_facts import EngineFactsCache
from stackctl.values.engine_facts import EngineFacts, EngineOption
from stackctl.values.profile import Profile
from stackctl.values.proxy import DEFAULT_IMAGE, LOCAL_IMAGE

#: The front door's images: the one built here, and the published one.
_DOOR_IMAGES = (LOCAL_IMAGE, DEFAULT_IMAGE)
_NO_DOOR = "the profile does without: requests fail while engines are switched"
_NO_DOOR_IMAGE = (
    "none, its image is not here: stackctl image build haproxy lets requests wait during a switch"
)


@dataclass(frozen=True)
class PlannedImage:
    """An image for a plan: its reference, the reason for it, and its facts if inspected."""

    reference: str
    reason: str
    facts: EngineFacts | None = None


@dataclass(frozen=True)
class ReadyImage:
    """An image that is on this machine; ``asked`` is the name by which it was found."""

    image: podman_api.Image
    asked: str
    reason: str
    facts: EngineFacts

    @property
    def planned(self) -> PlannedImage:
        """Return the image for a plan, by its pinned reference."""
        return PlannedImage(self.image.reference, self.reason, self.facts)


def image_for_planning(
    profile: Profile, engine: Engine, cache: EngineFactsCache | None
) -> PlannedImage:
    """Return the image for a plan without a deployment: one inspected before, else a local one.

    ``cache`` is None for a machine whose images are not known.
    """
    candidates = _candidates(profile, engine)
    if cache is None:
        reference, reason = candidates[-1]
        return PlannedImage(reference, reason if profile.image else "not looked at")
    for reference, reason in candidates:
        if facts := cache.latest(reference):
            return PlannedImage(facts.pinned, reason, facts)
    for reference, reason in candidates[:-1]:
        if podman.image_exists(reference):
            return PlannedImage(reference, reason)
    return PlannedImage(*candidates[-1])


def ready_image(context: Context, profile: Profile, engine: Engine) -> ReadyImage:
    """Return the engine's image, inspected; pull it if it is not on this machine.

    Raises:
        StackctlError: exit 6 if it cannot be pulled, or does not hold the engine.
    """
    with podman_api.connect(context.paths.runtime) as api:
        image, asked, reason = _ensure_image(context, api, profile, engine, may_pull=True)
    return ReadyImage(image, asked, reason, _inspect_engine(context, engine, image, asked))


def ready_images(
    context: Context, profile: Profile, engine: Engine, *, may_pull: bool
) -> tuple[ReadyImage, str | None, str]:
    """Pull the images of the engine and of its front door if necessary, and inspect the engine.

    Returns:
        The engine's image, the front door's (None: no front door), and the reason for the latter.

    Raises:
        StackctlError: exit 6 if an image cannot be pulled or lacks a program, exit 2 for a profile
            that turns off a front door that it needs.
    """
    with podman_api.connect(context.paths.runtime) as api:
        image, asked, reason = _ensure_image(context, api, profile, engine, may_pull)
        door, why_door = _ensure_proxy_image(context, api, profile, may_pull)
    facts = _inspect_engine(context, engine, image, asked)
    return ReadyImage(image, asked, reason, facts), door, why_door


def _ensure_image(
    context: Context, api: podman_api.Podman, profile: Profile, engine: Engine, may_pull: bool
) -> tuple[podman_api.Image, str, str]:
    """Return the image to run, the name by which it was found, and the reason for it."""
    candidates = _candidates(profile, engine)
    for reference, reason in candidates:
        if found := api.image(reference):
            context.progress.step("image", f"{reference}, present")
            return found, reference, reason
    reference, reason = candidates[-1]
    if reference.startswith("localhost/"):
        raise _not_built(engine, reference)
    recipe = _recipe(engine, reference)
    return _pull(context, api, reference, may_pull, recipe), reference, reason


def require_built(profile: Profile, engine: Engine) -> None:
    """Raise StackctlError (exit 6) if the profile's image can only be built here, and is not."""
    candidates = _candidates(profile, engine)
    reference, _ = candidates[-1]
    if reference.startswith("localhost/") and not any(
        podman.image_exists(name) for name, _ in candidates
    ):
        raise _not_built(engine, reference)


def _not_built(engine: Engine, reference: str) -> StackctlError:
    return StackctlError(
        f"there is no local image {reference}",
        hint=f"{get_image_command(engine, reference)}, or another one: --set image=NAME",
        exit_code=ExitCode.HOST,
    )


def proxy_image_for_planning(profile: Profile) -> tuple[str | None, str]:
    """Return the front door's image (None: no door) and the reason, without a pull."""
    return _choose_proxy_image(profile, podman.image_exists)


def _ensure_proxy_image(
    context: Context, api: podman_api.Podman, profile: Profile, may_pull: bool
) -> tuple[str | None, str]:
    """Return the front door's image (None: no door) and the reason; pull the image if necessary."""
    reference, reason = _choose_proxy_image(profile, lambda name: api.image(name) is not None)
    if reference is None:
        if reason == _NO_DOOR_IMAGE:
            context.progress.step("door", reason)
        return None, reason
    found = api.image(reference)
    if found is None:
        found = _pull(context, api, reference, may_pull, image_build.DOOR)
    return found.reference, reason


def _choose_proxy_image(profile: Profile, is_here: Callable[[str], bool]) -> tuple[str | None, str]:
    """Return the front door's image and the reason; None without a door.

    An image that is not here is chosen only if the profile needs a door.
    """
    if _without_door(profile):
        return None, _NO_DOOR
    here = next(filter(is_here, _DOOR_IMAGES), None)
    needed = profile.front_door == "on" or profile.api_key or profile.address != "127.0.0.1"
    if here is None and not needed:
        return None, _NO_DOOR_IMAGE
    image = here or _DOOR_IMAGES[-1]
    return image, f"requests wait while engines are switched ({image})"


def _without_door(profile: Profile) -> bool:
    """Return True if the profile turns the front door off.

    Raises:
        StackctlError: exit 2 if the profile's address or key needs a door, or its address a key.
    """
    if not profile.api_key and not ipaddress.ip_address(profile.address).is_loopback:
        raise StackctlError(
            f"address {profile.address} can be reached from other machines: it needs a key",
            hint="api_key: true in the profile, or --set api_key=true; then stackctl key show",
            exit_code=ExitCode.USAGE,
        )
    if profile.front_door != "off":
        return False
    if profile.api_key or profile.address != "127.0.0.1":
        key = "api_key" if profile.api_key else "address"
        raise StackctlError(
            f"{key}: only a front door does that, and the profile says front_door: off",
            hint="front_door: on",
            exit_code=ExitCode.USAGE,
        )
    return True


def _pull(
    context: Context,
    api: podman_api.Podman,
    reference: str,
    may_pull: bool,
    recipe: ImageRecipe | None,
) -> podman_api.Image:
    if not may_pull:
        raise StackctlError(
            f"image {reference} is not here, and a dry run pulls nothing",
            hint="stackctl render shows the unit without it",
            exit_code=ExitCode.HOST,
        )

    def report(progress: podman_api.PullProgress) -> None:
        text = progress.text[:60]
        if total := progress.total_bytes:
            text += f" {format_bytes(progress.done_bytes or 0)} of {format_bytes(total)}"
        context.progress.progress("image", f"{reference}: {text}")

    context.progress.progress("image", f"pulling {reference}")
    api.pull(reference, report, built=recipe.name if recipe else None)
    image = api.image(reference)
    if image is None:
        raise StackctlError(f"image {reference} is not here after its pull")
    context.progress.step("image", f"{image.reference}, pulled, {format_bytes(image.bytes)}")
    return image


def _inspect_engine(
    context: Context, engine: Engine, image: podman_api.Image, reference: str
) -> EngineFacts:
    """Return the facts of the image's engine, from the cache or else from the engine's --help.

    Raises:
        StackctlError: exit 6 if the image does not hold the engine, or lacks curl.
    """
    cache = context.engine_facts
    known = cache.get(image.id)
    if known is not None:
        if known.reference != reference or known.pinned != image.reference:
            known = msgspec.structs.replace(
                known, reference=reference, pinned=image.reference, seen=utc_now()
            )
            cache.put(known)
        return known
    context.progress.progress("image", f"reading the options of {engine.program}")
    _require_program(engine, image, reference)
    program, replaced = start_command(engine, image.entrypoint)
    entrypoint = replaced or next(iter(program), None)
    options = _read_options(engine, image, reference, entrypoint)
    _require_curl(image, reference)
    version = podman.run_once(image.id, ["--version"], entrypoint=entrypoint)
    facts = EngineFacts(
        engine=engine.name,
        image_id=image.id,
        reference=reference,
        pinned=image.reference,
        seen=utc_now(),
        version=engine.parse_version(version.stdout + version.stderr),
        program=program,
        entrypoint=replaced,
        options=options,
    )
    cache.put(facts)
    return facts


def start_command(engine: Engine, entrypoint: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the words before the engine's arguments, and the entry point to set (None: none).

    An entry point of several words, such as "PROGRAM serve", holds a part of the arguments, so its
    first word replaces it.
    """
    if not entrypoint:
        return (engine.program,), None
    return (), entrypoint[0] if len(entrypoint) > 1 else None


def _require_program(engine: Engine, image: podman_api.Image, reference: str) -> None:
    starts = image.entrypoint[0].rpartition("/")[2] if image.entrypoint else engine.program
    if starts != engine.program:
        raise StackctlError(
            f"image {reference} starts {starts}, not {engine.program}",
            hint="an image whose entry point is the engine, or one without entry point",
            exit_code=ExitCode.HOST,
        )


def _read_options(
    engine: Engine, image: podman_api.Image, reference: str, entrypoint: str | None
) -> tuple[EngineOption, ...]:
    """Return the options in the engine's help. Raise StackctlError (exit 6) if there are none."""
    done = podman.run_once(image.id, engine.help_arguments, entrypoint=entrypoint)
    options = engine.parse_help(done.stdout) if done.status == 0 else ()
    if options:
        return options
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    missing = done.status == 127 or "not found" in done.stderr
    raise StackctlError(
        f"image {reference} holds no {engine.program}"
        if missing
        else f"{engine.program} of image {reference} does not run here",
        details=lines[-3:],
        hint=f"{get_image_command(engine, reference)}, or another image: --set image=NAME",
        exit_code=ExitCode.HOST,
    )


def _require_curl(image: podman_api.Image, reference: str) -> None:
    if podman.run_once(image.id, ["--version"], entrypoint="curl").status != 0:
        raise StackctlError(
            f"image {reference} has no curl, which its health check needs",
            hint="an image with curl; the engine's own and those of stackctl image build have it",
            exit_code=ExitCode.HOST,
        )


def get_image_command(engine: Engine, reference: str) -> str:
    """Return the command that builds or pulls an image of an engine."""
    recipe = _recipe(engine, reference)
    if recipe is None:
        return f"podman pull {engine.default_image}"
    return f"stackctl image build {recipe.name}"


def _recipe(engine: Engine, reference: str) -> ImageRecipe | None:
    """Return the recipe of an image or of the engine's local image; None without one."""
    usual = (reference, engine.local_image)
    return next((recipe for recipe in engine.image_recipes if recipe.image in usual), None)


def _candidates(profile: Profile, engine: Engine) -> tuple[tuple[str, str], ...]:
    if profile.image is not None:
        return ((profile.image, "this image was asked for"),)
    if profile.forces_cpu and engine.cpu_image is not None:
        return ((engine.cpu_image, "built on this machine"),)
    return (
        (engine.local_image, "built on this machine"),
        (engine.default_image, f"published by {engine.name}; one built here would come first"),
    )
