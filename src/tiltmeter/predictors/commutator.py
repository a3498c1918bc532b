"""Commutator defect: how much it matters whether a safety step or a task step comes first.

With g_S and g_T the gradients of minus the margin and of the tuning loss, one step of each in either order ends eta^2
(H_T g_S - H_S g_T) apart, up to the third order.

Source: arXiv:2602.16746, where it foretells grokking; here between a safety batch and a task batch, and seen in the
safety subspace.
"""

from __future__ import annotations

from tiltmeter.geometry.space import norm
from tiltmeter.predictors.contract import Case, Risk, gradient_of, known, passes

#: Length of the longer of the two steps, parameter units.
STEP = 1e-2


def commutator(case: Case) -> Risk:
    """Norm of the difference inside the safety subspace over the product of the two steps' lengths.

    Cost: two gradients of either loss, one JVP over the answers.
    Error: exact for quadratic losses; third order in the step otherwise.
    """
    price = passes(case, tuning={"forward_backward": 2}, margin={"forward_backward": 2}, safety={"jvp": 1})
    unit = "per parameter unit"
    if case.sensitivity is None:
        return Risk(None, unit, price, reason=case.no_sensitivity or "no safety subspace")
    task, safe = gradient_of(case), case.margin_gradient
    sizes = norm(task), norm(safe)
    if not min(sizes) > 0:
        return Risk(None, unit, price, reason="one of the two gradients is zero")
    eta = STEP / max(sizes)
    weights = case.batches.mean(0)
    after_safe = case.tuning.gradient(weights, safe.to(task.dtype) * -eta)
    after_task = case.negative_margin.gradient(None, task * -eta)
    # theta_ST - theta_TS = -eta (g_S + g_T(after S) - g_T - g_S(after T))
    apart = (safe.to(task.dtype) + after_safe - task - after_task) * -eta
    inside = float(case.sensitivity.coordinates(apart).double().norm())
    return known(inside / (eta**2 * sizes[0] * sizes[1]), unit, price, "a gradient is not finite")
