"""The models of a repository that fit this machine, with predicted speed, before a download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from stackctl.cli.session import Session
from stackctl.errors import StackctlError
from stackctl.values.model_store import Choices, ModelChoice

if TYPE_CHECKING:
    from stackctl.deploy.planning import PlanBasis
    from stackctl.sources.hub_cache import HubSource
    from stackctl.sources.profiles import Profiles
    from stackctl.store.hub import RepoInfo
    from stackctl.store.remote_models import RepoModel
    from stackctl.values.model import Model
    from stackctl.values.plan import Plan

_MOST = 24


@dataclass(frozen=True)
class _Row:
    choice: RepoModel
    source: str
    plan: Plan | None


def show_remote(session: Session, source: str, parsed: HubSource) -> None:
    """Print the facts of a model on a hub, and how the models of its repository fit here.

    The largest model that fits and is fast enough is recommended.
    """
    from stackctl.plan.verdict import is_viable
    from stackctl.sources.model_text import model_rows
    from stackctl.store import hub
    from stackctl.store.remote_models import (
        choose_model,
        gguf_models,
        missing_shards,
        read_remote_facts,
        safetensors_model,
    )

    session.out.progress("model", f"asking for {source}")
    info = hub.query_repo(
        parsed.repo, parsed.revision or "main", report_wait=partial(session.out.progress, "model")
    )
    whole = safetensors_model(info)
    known = [*([whole] if whole is not None else []), *gguf_models(info)]
    choices = [choice for choice in known if missing_shards(choice) is None]
    several = parsed.quant is None and len(choices) > 1
    # The one of middle size stands for all: they differ only in the types of their tensors.
    chosen = (
        choices[len(choices) // 2]
        if parsed.quant is None and choices
        else choose_model(info, parsed.quant)
    )
    session.out.progress("model", "reading the beginning of its files")
    model = read_remote_facts(source, info, chosen, session.paths().cache)
    if session.out.json and not several:
        session.out.data(model)
        return
    basis = session.plan_basis()

    def row(choice: RepoModel) -> _Row:
        label = choice.label or choice.files[0].path
        at = f"@{parsed.revision}" if parsed.revision else ""
        named = f"hf:{info.repo}{at}" + ("" if choice.format == "safetensors" else f":{label}")
        if choice.format != chosen.format:
            return _Row(choice, named, None)
        scaled = _scaled(model, chosen, choice, named)
        return _Row(choice, named, _best(basis, session.profiles(), scaled))

    found = [row(choice) for choice in choices[:_MOST]]
    # More bits answer better.
    good = [row for row in found if row.plan is not None and is_viable(row.plan)]
    best = max(good, key=lambda row: row.choice.bytes, default=None)
    if session.out.wrote_json(_document(info, found, best)):
        return
    session.out.properties(model_rows(model))
    session.out.line()
    _table(session, found, best)


def _scaled(model: Model, chosen: RepoModel, choice: RepoModel, source: str) -> Model:
    """Return the facts of another quantisation: the same, with sizes scaled as the files are."""
    if choice == chosen:
        return msgspec.structs.replace(model, source=source)
    ratio = choice.bytes / chosen.bytes

    def grown(count: int | None) -> int | None:
        return None if count is None else round(count * ratio)

    return msgspec.structs.replace(
        model,
        source=source,
        quantization=choice.label,
        weights_bytes=round(model.weights_bytes * ratio),
        expert_bytes=grown(model.expert_bytes),
        embedding_bytes=grown(model.embedding_bytes),
    )


def _best(basis: PlanBasis, profiles: Profiles, model: Model) -> Plan | None:
    """Return the best plan of the engines that serve the model; None if none can be made."""
    from stackctl.deploy.planning import plan_profile
    from stackctl.engines import ENGINES
    from stackctl.plan.verdict import is_viable
    from stackctl.values.profile import Overrides

    plans = []
    fitting = (one for one in ENGINES.values() if one.model_format == model.format)
    for name in (name for one in fitting for name in one.trial_profiles):
        try:
            own = profiles.resolve(name, Overrides())
            if own.placement.cpu_experts is not None and not model.experts:
                continue
            wanted = msgspec.structs.replace(own, model=model.source, served_name=None)
            plans.append(plan_profile(basis, wanted, model).plan)
        except StackctlError:
            continue
    return max(plans, key=lambda plan: (plan.verdict.fits is True, is_viable(plan), _speed(plan)),
               default=None)  # fmt: skip


def _speed(plan: Plan) -> float:
    speed = plan.prediction.decode_tok_s
    return sum(speed) / 2 if speed else 0.0


def _predicted_speed(plan: Plan) -> str:
    """Return the predicted speed as text: tokens per second, or the time to first token."""
    if speed := plan.prediction.decode_tok_s:
        return f"{speed[0]:.0f}-{speed[1]:.0f} tok/s"
    first = plan.prediction.ttft_s
    if first is not None and first.range is not None:
        return f"first token {first.range[0]:.2g}-{first.range[1]:.2g} s"
    return "unknown"


def _table(session: Session, rows: list[_Row], best: _Row | None) -> None:
    from stackctl.quantity import format_bytes

    shown = []
    for row in rows:
        fits, speed, how = "?", "", ""
        if row.plan is not None:
            speed = _predicted_speed(row.plan)
            how = row.plan.profile
            if row.plan.verdict.fits is False:
                need = format_bytes(row.plan.memory.total_bytes)
                of = format_bytes(row.plan.memory.limit_bytes or 0)
                fits, speed = f"no: {need} of {of}", ""
            else:
                fits = "yes" if row.plan.verdict.viable is not False else "yes, too slow"
        label = row.choice.label or row.source.rpartition(":")[2]
        mark = "best" if row is best else ""
        shown.append((label, format_bytes(row.choice.bytes), fits, speed, how, mark))
    session.out.table(
        ("QUANTISATION", "SIZE", "FITS HERE", "PREDICTED", "PROFILE", ""), shown, fold=0
    )
    if best is not None:
        session.out.note(
            f"stackctl up {best.plan.profile if best.plan else ''} --model {best.source}"
        )
    else:
        session.out.note("none of them is known to fit and to be fast enough here")


def _document(info: RepoInfo, rows: list[_Row], best: _Row | None) -> Choices:
    return Choices(
        repo=info.repo,
        commit=info.commit,
        choices=tuple(
            ModelChoice(
                source=row.source,
                quantization=row.choice.label,
                format=row.choice.format,
                bytes=row.choice.bytes,
                profile=row.plan.profile if row.plan else None,
                fits=row.plan.verdict.fits if row.plan else None,
                viable=row.plan.verdict.viable if row.plan else None,
                decode_tok_s=row.plan.prediction.decode_tok_s if row.plan else None,
                recommended=row is best,
            )
            for row in rows
        ),
    )
