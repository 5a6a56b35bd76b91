"""flux-krea completion: what makes a shell complete our verbs and options."""

import click
from click.shell_completion import get_completion_class, shell_complete

VARIABLE = "_FLUX_KREA_COMPLETE"  # in which the shell's script asks


@click.command()
@click.argument("shell", type=click.Choice(["zsh", "bash", "fish"]))
@click.pass_context
def completion(context, shell):
    """Print what makes SHELL complete verbs, options and models.

    \b
    Examples:
      echo 'eval "$(flux-krea completion zsh)"' >> ~/.zshrc
      echo 'eval "$(flux-krea completion bash)"' >> ~/.bashrc
      flux-krea completion fish > ~/.config/fish/completions/flux-krea.fish
    """
    script = get_completion_class(shell)(context.find_root().command, {}, "flux-krea", VARIABLE)
    click.echo(script.source_template % script.source_vars())


def answer(group: click.Group, asked: str) -> int:
    """What the shell's script asks for, on stdout; gives the exit code."""
    return shell_complete(group, {}, "flux-krea", VARIABLE, asked)
