"""``stackctl profiles``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from stackctl.cli.options import facts_option, plan_options
from stackctl.cli.session import Session, stackctl_command
from stackctl.quantity import format_bytes
from stackctl.values.base import Value
from stackctl.values.plan import Scalar
from stackctl.values.profile import EngineArgument, Overrides, Profile
from stackctl.values.profile_list import ProfileSummary


class _Default(click.Group):
    """Group that runs ``profiles list`` if there is no subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not any(name in args for name in (*self.commands, "--help", "-h")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("profiles", cls=_Default)
def command() -> None:
    """List, show and describe profiles. The default command is list."""


@stackctl_command("list")
@plan_options
@facts_option
def list_profiles(session: Session, facts: Path | None, **_: object) -> None:
    """List the profiles: which of them fit this machine, how fast, and what they would download.

    The predictions are those of "stackctl plan". Nothing is downloaded, and no server is asked.
    """
    from stackctl.deploy.profile_overview import profile_overview

    found = profile_overview(session.plan_basis(facts), session.profiles())
    if session.out.wrote_json(found):
        return
    rows = [
        (one.name, fits_text(one), speed_text(one), _download_text(one), _content(one))
        for one in found.profiles
    ]
    session.out.table(("PROFILE", "FITS HERE", "EXPECTED", "DOWNLOAD", "WHAT"), rows, fold=4)
    unpublished = [one.name for one in found.profiles if one.fits and _download_text(one) == "none"]
    if unpublished:
        names = ", ".join(unpublished)
        session.out.note(f"no download is known for {names}: stackctl profiles show NAME")
    best = next((one for one in found.profiles if one.recommended), None)
    if best is not None:
        session.out.note(f"the best for this machine: stackctl up {best.name}")


def fits_text(one: ProfileSummary) -> str:
    """Return the verdict on a profile in at most nine characters."""
    if one.fits is None:
        return "?" if one.model is not None else "no model"
    if not one.fits:
        return "no GPU" if one.on_gpu and one.memory_bytes is None else "no"
    return "too slow" if one.viable is False else "yes"


def speed_text(one: ProfileSummary) -> str:
    """Return the predicted speed of a profile: tokens per second, else the time to first token."""
    from stackctl.plan.verdict import format_range

    if one.decode_tok_s is not None:
        return f"{format_range(one.decode_tok_s)} tok/s"
    if one.ttft_s is not None and one.ttft_s.range is not None:
        return f"TTFT {format_range(one.ttft_s.range)} s"
    return ""


def _content(one: ProfileSummary) -> str:
    """Return the description of a profile; the reason if its model cannot be read."""
    unread = one.fits is None and one.model is not None and one.reason
    return one.reason or "" if unread else one.description


def _download_text(one: ProfileSummary) -> str:
    if one.download_bytes is not None:
        return format_bytes(one.download_bytes) if one.download_bytes else "here"
    if one.fetched_from is not None:
        return "?"
    return "" if one.model is None else "none"


@stackctl_command("show")
@click.argument("profile_name", metavar="NAME")
@plan_options
def show(session: Session, profile_name: str, asked: Overrides) -> None:
    """Show profile NAME with all values that apply.

    It includes the profiles that NAME extends, its objective and the overrides. Values of the
    objective and of the command line are marked.
    """
    from stackctl.sources.catalogue import replacement_advice

    profiles = session.profiles()
    profile = profiles.resolve(profile_name, asked)
    if session.out.wrote_json(profile):
        return
    origins = dict.fromkeys(
        profiles.keys_by_objective(profile_name, asked), f"objective {profile.objective}"
    )
    origins |= dict.fromkeys(profile.overrides, "command line")
    if profile.model is not None and (note := _model_note(profile.model)):
        origins["model"] = note
    session.out.line(f"{profile.name}: {profile.description or ''}".rstrip(": "))
    rows = [
        (key, f"{value}  ({origins[key]})" if key in origins else value)
        for key, value in _rows(profile)
    ]
    session.out.table(("KEY", "VALUE"), rows, fold=1)
    if advice := replacement_advice(profile.model or ""):
        session.out.labelled("model", advice, column=7)


def _model_note(source: str) -> str | None:
    """Return a note on the origin of the files of a model that has none of its own."""
    from stackctl.sources.catalogue import find_download

    if (download := find_download(source)) is not None:
        return f"up fetches {download.source}"
    if source.startswith(("catalogue:", "facts:")):
        return "for plans only: up needs --model"
    return None


#: Fields without a row of their own: the title and ``served_name`` contain them.
_JOINED = frozenset({"schema", "name", "description", "other_names"})
#: The text of every other key without a value.
_DERIVED = "(derived)"
#: Texts for keys without a value that the plan does not derive.
_UNSET = {
    "model": "(none: --model)",
    "image": "(chosen by stackctl)",
    "served_name": "(the model's file name)",
    "slo": "(none)",
}


def _rows(profile: Profile) -> Iterator[tuple[str, str]]:
    """Yield the key and value of every field of a profile, named as in profile files."""
    for key in profile.__struct_fields__:
        value, unset = getattr(profile, key), _UNSET.get(key, _DERIVED)
        if key in _JOINED:
            continue
        if isinstance(value, Value):
            for inner in value.__struct_fields__:
                if (key, inner) != ("slo", "prompt_tokens") or profile.slo.ttft_s is not None:
                    yield f"{key}.{inner}", _text(getattr(value, inner), unset)
        elif key == "served_name":
            yield key, ", ".join((value or unset, *profile.other_names))
        elif key.endswith("_bytes"):
            yield key.removesuffix("_bytes"), format_bytes(value)
        elif key == "engine_args":
            for argument in value:
                yield f"{key}.{argument.name}", _argument(argument)
        elif key == "files":
            yield from (("from", file) for file in value)
        elif isinstance(value, tuple):
            yield key, ", ".join(value) or "(none)"
        else:
            yield key, _text(value, unset)


def _argument(argument: EngineArgument) -> str:
    if argument.values is None:
        return "(left out)"
    return " ".join(_text(value, "") for value in argument.values) or "true"


def _text(value: Scalar, unset: str) -> str:
    """Return a value as it is written in a profile."""
    if value is None:
        return unset
    return str(value).lower() if isinstance(value, bool) else str(value)


@stackctl_command("schema")
def schema(session: Session) -> None:
    """Print the JSON Schema of profile files, for editors."""
    from stackctl.sources.profiles import profile_schema

    session.out.line(json.dumps(profile_schema(), indent=2))


for _command in (list_profiles, show, schema):
    command.add_command(_command)
