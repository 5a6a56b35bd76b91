"""Decides what a transformer reads besides a prompt, its task, and the kind of maps that a control model was made for.

The number of its input channels tells fill and control. FLUX.1 Kontext [dev] has the shapes of FLUX.1 [dev], and Canny
those of Depth: there the repository decides, or what the source says of itself, or the person who converts. The name of
a file alone never makes a Kontext, since a model of another task would then read its input picture in another way.
"""

from typing import NamedTuple

from mlx_flux_krea import presets
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.models.config import FluxConfig

from .evidence import stated_names
from .sources import Source

# Tasks as `convert` takes them: a kind of maps is of control.
ASKED = {task: (task, None) for task in presets.TASKS} | {kind: ("control", kind) for kind in presets.KINDS}


class Task(NamedTuple):
    """The task of a transformer, one of `presets.TASKS`, and the kind of its maps: one of `presets.KINDS`, or None."""

    name: str
    kind: str | None
    note: str = ""  # for the person who converts


TEXT_TO_IMAGE = Task(presets.TASKS[0], None)


def find_task(source: Source, config: FluxConfig, asked: str | None) -> Task:
    """Decides the task of a foreign transformer.

    Args:
        source: of the transformer.
        config: its sizes.
        asked: a key of `ASKED`, or None.

    Raises:
        UsageError: the task asked for has other channels, or only a person can tell.
    """
    if asked is not None:
        return check_task(config, asked)
    stated, named = stated_names(source), (source.path.name, source.folder.name)
    if config.tasks[0] == "control":
        return _control(stated, named)
    if "kontext" in config.tasks:
        if any("kontext" in name.lower() for name in stated):
            return Task("kontext", None)
        if any("kontext" in name.lower() for name in named):
            raise UsageError(
                f"{source.path} is called Kontext, and has the shapes of FLUX.1 [dev]",
                "`task` kontext or text-to-image",
            )
    return TEXT_TO_IMAGE._replace(name=config.tasks[0])


def check_task(config: FluxConfig, asked: str) -> Task:
    """Returns the task that a person asked for.

    Raises:
        UsageError: there is none of that name, or a transformer of these channels does not have it.
    """
    if asked not in ASKED:
        raise UsageError(f'no task is called "{asked}"', f"one of {', '.join(ASKED)}")
    name, kind = ASKED[asked]
    if name not in config.tasks:
        found = f"`task` {asked}, and the transformer has in_channels {config.in_channels}"
        known = (one for one, (task, _) in ASKED.items() if task in config.tasks)
        raise UsageError(found, f"`task` {' or '.join(known)}", "leave `task` out")
    return Task(name, kind)


def _control(stated: tuple[str, ...], named: tuple[str, ...]) -> Task:
    """Returns the task of a control model, with the kind in the first of its names that holds one kind alone."""
    by_name = "kind {}, by its name; if that is wrong, convert it with `task` {}"
    for name, note in (*((name, "") for name in stated), *((name, by_name) for name in named)):
        kinds = [kind for kind in presets.KINDS if kind in name.lower()]
        if len(kinds) == 1:
            (other,) = set(presets.KINDS) - set(kinds)
            return Task("control", kinds[0], note.format(kinds[0], other))
    note = "nothing says if it reads edges or depth; `task` canny or depth records that, and the default guidance"
    return Task("control", None, note)
