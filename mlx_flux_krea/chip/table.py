"""The table of checks, in the order in which `flux-krea doctor --chip` makes them, whatever the others say."""

import time
from collections.abc import Iterator
from functools import partial

from ..worker import limit_cache
from . import kernels, machine, outputs, products, streaming, wheel
from .check import Check, CheckResult, Setting

CHECKS = (
    Check("mlx's library", machine.library),
    Check("device", machine.backend),
    *(Check(name, partial(machine.switch, name)) for name in wheel.SWITCHES),
    *(Check(f"small model, {kind}", partial(outputs.small_model, kind)) for kind in outputs.KINDS),
    *(Check(f"products, {dtype}", partial(products.dense, dtype)) for dtype in products.BOUNDS),
    *(
        Check(f"products, {name}, {dtype}", partial(products.quantized, name, dtype))
        for name in products.QUANTIZED
        for dtype in products.QUANTIZED_BOUNDS
    ),
    *(Check(f"attention, width {name}", check) for name, check in kernels.ATTENTION_CHECKS.items()),
    *(Check(f"convolution, {dtype}", partial(kernels.convolution, dtype)) for dtype in kernels.CONVOLUTION_BOUNDS),
    Check("compiled functions", kernels.compiled),
    Check("streamed blocks", streaming.same_bits),
    Check("longest command", machine.longest_command),
    Check("too large an allocation", machine.allocation),
    Check("disk", streaming.disk),
    Check("names", machine.names),
    Check("locks", machine.locks),
    Check("writing down", machine.written_down),
    Check("staying awake", machine.stays_awake),
    Check("pictures in the terminal", machine.shows_pictures),
)


def make_checks(setting: Setting) -> Iterator[tuple[Check, CheckResult, float]]:
    """Makes all checks. Gives each with its result and its seconds; one that fails with an error is wrong."""
    limit_cache()
    for check in CHECKS:
        start = time.perf_counter()
        try:
            result = check.run(setting)
        except Exception as error:  # of any kind: the next check is made all the same
            text = " ".join(f"{type(error).__name__}: {error}".split())
            result = CheckResult(text, "a result", False, "please report it")
        yield check, result, time.perf_counter() - start
