"""Every statement of the theory, tried on systems whose answer is known: `tiltmeter theory`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import scipy
import torch

import tiltmeter
from tiltmeter.jobs.theory_adam import adam_claims
from tiltmeter.jobs.theory_claim import Claim
from tiltmeter.jobs.theory_descent import descent_claims
from tiltmeter.jobs.theory_kl import kl_claims
from tiltmeter.jobs.theory_law import law_claims
from tiltmeter.jobs.theory_lora import lora_claims
from tiltmeter.jobs.theory_noise import noise_claims
from tiltmeter.jobs.theory_overlap import overlap_claims
from tiltmeter.jobs.theory_paths import path_claims
from tiltmeter.jobs.theory_projection import projection_claims

SCHEMA = "tiltmeter/theory/1"

#: The order in which docs/theory.md derives the claims.
TOPICS = (
    kl_claims,
    law_claims,
    overlap_claims,
    descent_claims,
    noise_claims,
    adam_claims,
    lora_claims,
    path_claims,
    projection_claims,
)


@dataclass(frozen=True)
class TheoryCheck:
    """All claims and how they came out.

    Attributes:
        seed: of the random systems.
        claims: in the order of docs/theory.md.
    """

    seed: int
    claims: tuple[Claim, ...]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def lines(self) -> list[str]:
        """One line per claim and a last one that counts them."""
        held = sum(claim.holds for claim in self.claims)
        return [*(claim.line() for claim in self.claims), f"{held} of {len(self.claims)} claims hold"]

    def record(self) -> dict[str, Any]:
        """JSON values for `store.write_record`.

        A found value that is not finite is written as null; its claim does not hold, and the reason says so.
        """
        claims = [claim.record() for claim in self.claims]
        reasons = {}
        for index, claim in enumerate(claims):
            for place, value in enumerate(claim["found"]):
                if value is None:
                    reasons[f"claims.{index}.found.{place}"] = "the value came out as infinite or not a number"
        versions = {
            "tiltmeter": tiltmeter.__version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        }
        return {
            "schema": SCHEMA,
            "seed": self.seed,
            "holds": self.holds,
            "claims": claims,
            "versions": versions,
            "reasons": reasons,
        }


def run_theory(seed: int = 0) -> TheoryCheck:
    """Try every claim at several scales.

    Args:
        seed: of the random systems; the claims must hold for any.

    Returns:
        The check; nothing is raised for a claim that fails.

    Cost: about 15 s on one core; no model and no data.
    """
    claims = [claim for topic in TOPICS for claim in topic(seed)]
    return TheoryCheck(seed, tuple(claims))
