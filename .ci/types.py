"""Types that pyright and mypy must find in the installed wheel; `.ci/run` runs both over a copy of this file.

The last line is an error, and each checker complains of its comment if it does not see the class.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path
from typing import assert_type

from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.maps import Rows

from mlx_flux_krea import FluxPipeline

assert_type(convert(["FLUX.1-schnell"]).path, Path)
assert_type(Rows("a", "b").names, tuple[str, ...])
FluxPipeline.from_pretrained("nano").enable_model_cpu_offload()
FluxPipeline.from_pretrained("nano").no_such_name  # type: ignore  # noqa: B018
