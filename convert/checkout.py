"""Refuses a converter and a package of two checkouts; imported before anything else of either.

With an editable install of one checkout, a Python that starts in the folder of another takes `mlx_flux_krea` from there
and `mlx_flux_krea.convert` from the installed one. The two may not fit, and neither says so.
"""

from pathlib import Path

from mlx_flux_krea import __path__ as _package_path
from mlx_flux_krea.errors import UsageError

_PACKAGE, _CONVERTER = Path(next(iter(_package_path))).resolve(), Path(__file__).resolve().parent

if _CONVERTER.parent not in (_PACKAGE, _PACKAGE.parent):  # as in a wheel, and as in a checkout
    raise UsageError(
        f"mlx_flux_krea was imported from {_PACKAGE}, and mlx_flux_krea.convert from {_CONVERTER}",
        "both from one checkout",
        f"start Python in another folder, or install this checkout: pip install -e {_PACKAGE.parent}",
    )
