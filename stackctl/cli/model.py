"""``stackctl model``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, verb


@click.group("model")
def command() -> None:
    """Look at models."""


@verb("show")
@click.argument("source")
def show(session: Session, source: str) -> None:
    """Show what is known of the model at SOURCE.

    \b
    SOURCE is one of
      file:PATH                  a GGUF file; of several parts, any
      dir:PATH                   a folder with config.json and safetensors files
      hf:ORG/REPO[@REV][:QUANT]  the local hub cache, else the catalogue
      catalogue:ID               a model that `stackctl model catalogue` lists
      facts:FILE                 what `stackctl model show --json` printed
    """
    import textwrap

    from stackctl.sources.describe import describe
    from stackctl.sources.models import read_model

    model = read_model(source)
    if session.out.json:
        session.out.data(model)
        return
    rows = describe(model)
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        lines = textwrap.wrap(text, 80 - width, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines or [""]):
            session.out.line(f"{'' if number else name:<{width}}{line}".rstrip())


@verb("catalogue")
def catalogue(session: Session) -> None:
    """List the models whose facts are known without a download."""
    import json

    from stackctl.quantity import format_bytes
    from stackctl.sources.catalogue import entries, read_entry
    from stackctl.sources.describe import count

    models = [(name, read_entry(name)) for name in sorted(entries())]
    if session.out.json:
        document = {"schema": "stackctl.catalogue/1", "models": [name for name, _ in models]}
        session.out.line(json.dumps(document, indent=2))
        return
    rows = [
        (
            name,
            count(model.parameters),
            model.quantization or "",
            format_bytes(model.weights_bytes),
        )
        for name, model in models
    ]
    session.out.table(("CATALOGUE", "SIZE", "QUANTISATION", "WEIGHTS"), rows, fold=0)


command.add_command(show)
command.add_command(catalogue)
