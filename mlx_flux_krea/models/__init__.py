"""Networks: functions of arrays, with their sizes. They read no file, print nothing and draw no random number.

Whoever runs a network decides when it is evaluated. A network passes each of its stages, in order, through
`run(stage, *args)`, which returns the stage's result, evaluated or not; by default it only calls the stage.
"""

from collections.abc import Callable
from typing import Any

Runner = Callable[..., Any]  # run(stage, *args)


def call(stage: Callable[..., Any], *args: Any) -> Any:
    """Calls a stage; the graph stays lazy."""
    return stage(*args)
