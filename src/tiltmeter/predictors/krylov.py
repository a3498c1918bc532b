"""The locally quadratic path: exact descent on the loss's parabola, from a few Hessian products.

Source: Lanczos 1950 for the Krylov space; the response of SGD to it is derived in docs/theory.md.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk
from tiltmeter.predictors.path import kl_rise, margin_drop

#: Hessian products that the cost is quoted for.
PRODUCTS = 5.0


def krylov_margin(case: Case) -> Risk:
    """Margin drop along the Krylov path; SGD only. Cost: a gradient, five Hessian products, the forward passes."""
    return margin_drop(case, "krylov", {"forward_backward": 1, "hvp": PRODUCTS})


def krylov_kl(case: Case) -> Risk:
    """Safety KL along the Krylov path; SGD only. Cost: as `krylov_margin`."""
    return kl_rise(case, "krylov", {"forward_backward": 1, "hvp": PRODUCTS})
