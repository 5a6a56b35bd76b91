"""flux-krea ui: the page on this machine."""

import importlib
import webbrowser

import click

from mlx_flux_krea.errors import UsageError

from .shared import signals
from .shared.terminal import Console
from .shared.text import json_text


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port on 127.0.0.1.  [default: 7860, or the next free one]")
@click.option("--no-open", is_flag=True, help="Do not open the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print the link and the token as JSON.")
def ui(port, no_open, as_json):
    """Open the page on this machine: queue, pictures, review.

    The page listens on 127.0.0.1 alone, and its link holds a token, without which nobody gets an answer. Programs that
    speak OpenAI's images interface can use it too. Ctrl-C ends it; a picture in the making is continued at the next
    start.

    \b
    Example:
      flux-krea ui
      flux-krea ui --port 8000 --no-open --json
    """
    try:
        serving = importlib.import_module("mlx_flux_krea.server.serving")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mlx_flux_krea"):
            raise
        todo = "pip install 'mlx-flux-krea[ui]'"
        raise UsageError(f"the page needs {error.name}, which is not installed", "the extra ui", todo) from None
    console = Console()
    with serving.alone():
        with signals.held():
            server = serving.PageServer(port)
            server.start()
        try:
            if as_json:
                click.echo(json_text({"url": server.url, "token": server.token}))
            else:
                click.echo(server.url)
                console.say("the page is open to this machine alone; Ctrl-C ends it")
            if not no_open:
                webbrowser.open(server.url)
            server.wait()
        finally:
            with signals.held():
                server.stop()
