"""Checks that jedi completes the installed package: `python .ci/complete.py ENVIRONMENT`, a virtual environment."""

import sys

import jedi

environment = jedi.create_environment(sys.argv[1], safe=False)
for code, expected in (
    ("from mlx_flux_krea import FluxPipeline\nFluxPipeline.from_pretrained('nano').", "encode_prompt"),
    ("import mlx_flux_krea.convert\nmlx_flux_krea.convert.", "convert"),
    ("from mlx_flux_krea.convert.maps import Rows\nRows('a').", "names"),
):
    names = {completion.name for completion in jedi.Script(code, environment=environment).complete()}
    assert expected in names, f"jedi completes {code!r} by {sorted(names)[:20]}"
print("jedi completes the pipeline and the converter")
