"""Conversion with progress, for `convert` and `setup`: a converted filter also passes its self-test."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from mlx_flux_krea import macos
from mlx_flux_krea.convert import Report
from mlx_flux_krea.convert import convert as run_converter
from mlx_flux_krea.home import named
from mlx_flux_krea.weights import FILTERS

from . import rounding, signals, trials
from .terminal import ByteProgress, Console


def _continued(gptq: bool) -> contextlib.AbstractContextManager:
    """Says after a signal how a conversion is continued that may be."""
    return signals.continued("the same command continues") if gptq else contextlib.nullcontext()


def convert_sources(
    sources: Sequence[str | Path], output: Path | None, console: Console, *, gptq: bool = False, **options
) -> Report:
    """Converts files, folders, hub repositories or installed models into a model folder.

    Args:
        sources: paths, hub ids, or names of installed models.
        output: the folder to make; None: a folder in the home folder.
        console: where progress is shown.
        gptq: round the transformer by the inputs of its layers.
        options: of `mlx_flux_krea.convert.convert`.

    Raises:
        FluxKreaError: as `mlx_flux_krea.convert.convert`; FiltersError where a filter fails its self-test.
    """
    progress = ByteProgress(rounding.UNITS)
    options["gptq"] = rounding.gptq(console, progress) if gptq else None
    with macos.awake(), console.library_notes(), _continued(gptq):
        try:
            report = run_converter([named(source) for source in sources], output, progress=progress, **options)
        finally:
            progress.close()
        name = report.components[0].name
        if name in FILTERS:
            signals.let_go()  # after an interrupt here, the next `setup` runs the self-test
            trials.record(name, report.path, console)
    return report
