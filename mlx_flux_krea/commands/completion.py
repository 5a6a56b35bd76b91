"""flux-krea completion: the script by which a shell completes verbs, options and models."""

import click
from click.shell_completion import get_completion_class, shell_complete

# A new Mac's zsh defines `compdef` only after `compinit`; -i passes over folders that others may write.
_LOAD_COMPDEF = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i; }"
VARIABLE = "_FLUX_KREA_COMPLETE"  # set by the shell's script when it asks for completions


@click.command()
@click.argument("shell", type=click.Choice(["zsh", "bash", "fish"]))
@click.pass_context
def completion(context, shell):
    """Print the completion script for a shell.

    It completes verbs, options and names of models.

    \b
    Examples:
      echo 'eval "$(flux-krea completion zsh)"' >> ~/.zshrc
      echo 'eval "$(flux-krea completion bash)"' >> ~/.bashrc
      flux-krea completion fish > ~/.config/fish/completions/flux-krea.fish
    """
    kind = get_completion_class(shell)
    assert kind, shell  # click has a class for each choice
    script = kind(context.find_root().command, {}, "flux-krea", VARIABLE)
    text = script.source_template % script.source_vars()
    click.echo(text.replace("    compdef ", f"    {_LOAD_COMPDEF}\n    compdef "))


def answer(group: click.Group, instruction: str) -> int:
    """Prints completions for the shell's script. Returns the exit code."""
    return shell_complete(group, {}, "flux-krea", VARIABLE, instruction)
