"""Guards by the names of the command line."""

from __future__ import annotations

from tiltmeter.guards.alignguard import AlignGuard
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.ema import AverageWeights
from tiltmeter.guards.ewc import ElasticWeights
from tiltmeter.guards.freeze import FreezeLayers
from tiltmeter.guards.gradient_projection import GradientProjection
from tiltmeter.guards.gu import MetricGradientProjection
from tiltmeter.guards.lisa import Alternation
from tiltmeter.guards.lox import Extrapolation
from tiltmeter.guards.none import NoGuard
from tiltmeter.guards.replay import Replay
from tiltmeter.guards.safe_lora import SafeLora
from tiltmeter.guards.safegrad import SafeGrad
from tiltmeter.guards.token_loss import ConstrainedTokens

GUARDS = {
    "budget": CurvatureBudget,
    "gradient": GradientProjection,
    "gu": MetricGradientProjection,
    "safegrad": SafeGrad,
    "ewc": ElasticWeights,
    "alignguard": AlignGuard,
    "safe_lora": SafeLora,
    "token_loss": ConstrainedTokens,
    "replay": Replay,
    "lisa": Alternation,
    "ema": AverageWeights,
    "lox": Extrapolation,
    "freeze": FreezeLayers,
    "none": NoGuard,
}
