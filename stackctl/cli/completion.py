"""``stackctl completion``."""

from __future__ import annotations

import click

from stackctl.cli.session import Session, stackctl_command


@stackctl_command("completion")
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def command(session: Session, shell: str) -> None:
    """Print the completion script of SHELL (bash, zsh, fish).

    bash: stackctl completion bash > ~/.local/share/bash-completion/completions/stackctl
    """
    from click.shell_completion import get_completion_class

    from stackctl.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    session.out.line(kind(cli, {}, "stackctl", "_STACKCTL_COMPLETE").source().rstrip())
