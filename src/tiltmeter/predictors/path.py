"""Ours: KL and margin evaluated through the network along the optimiser's own simulated path.

Source: this project, docs/theory.md; the condition it quantifies is that of Springer et al. 2026, arXiv:2602.15799.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import REHEARSED, Case, Risk, known, passes, trend

NOT_FINITE = "the path left the range of numbers"


def margin_drop(case: Case, path: str, cost: dict[str, float]) -> Risk:
    """Fall of the mean refusal margin at the end of a path, nats."""
    price = _price(case, cost, path)
    if path not in case.measured.paths:
        return Risk(None, "nats", price, reason=f"the {path} path was not built for this recipe and these options")
    values = case.measured.paths[path]
    drop = (case.anchor_margin.double().cpu() - values.margin).mean(-1)
    return known(float(drop[-1]), "nats", price, NOT_FINITE, trend(values, drop))


def kl_rise(case: Case, path: str, cost: dict[str, float]) -> Risk:
    """Mean safety KL at the end of a path, with the energy of one run's batch noise, nats per token."""
    price = _price(case, cost, path)
    if path not in case.measured.paths:
        return Risk(
            None, "nats per token", price, reason=f"the {path} path was not built for this recipe and these options"
        )
    values = case.measured.paths[path]
    kl = values.safety_kl.mean(-1) * case.measured.kl_factor[path][list(values.steps)]
    return known(float(kl[-1]), "nats per token", price, NOT_FINITE, trend(values, kl))


def rehearsed_margin(case: Case) -> Risk:
    """Margin drop in a rehearsal of the run. Cost: its looks at the gradient, a reading of the margin per grid step."""
    return margin_drop(case, REHEARSED, {"forward_backward": case.measured.rehearsal_passes})


def rehearsed_kl(case: Case) -> Risk:
    """Safety KL in a rehearsal of the run. Cost: as `rehearsed_margin`."""
    return kl_rise(case, REHEARSED, {"forward_backward": case.measured.rehearsal_passes})


def curved_margin(case: Case) -> Risk:
    """Margin drop along the curved path. Cost: two gradients, one forward pass over the openings per grid step."""
    return margin_drop(case, "curved", {"forward_backward": 2})


def curved_kl(case: Case) -> Risk:
    """Safety KL along the curved path. Cost: as `curved_margin`."""
    return kl_rise(case, "curved", {"forward_backward": 2})


def linear_margin(case: Case) -> Risk:
    """Margin drop along the straight path. Cost: one gradient, one forward pass over the openings per grid step."""
    return margin_drop(case, "linear", {"forward_backward": 1})


def linear_kl(case: Case) -> Risk:
    """Safety KL along the straight path. Cost: as `linear_margin`."""
    return kl_rise(case, "linear", {"forward_backward": 1})


def _price(case: Case, tuning: dict[str, float], path: str) -> float:
    values = case.measured.paths.get(path)
    points = {"forward": float(len(values.steps) if values is not None else 0)}
    return passes(case, tuning=tuning, safety=points, margin=points)
